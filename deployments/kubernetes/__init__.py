"""Manifests for Kubernetes (kustomize), the templates of the work pools, and the checks of both."""
