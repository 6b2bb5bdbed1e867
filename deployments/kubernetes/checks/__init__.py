"""Builds what is in deployments/kubernetes and holds it against the API's schemas and this project's rules.

`build` runs kustomize, `pools` renders the work pools' Jobs, `schemas` knows the API, `policy` the rules; `python -m
deployments.kubernetes.checks` does all of it.
"""
