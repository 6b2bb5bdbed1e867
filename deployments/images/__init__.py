"""The container images: their Dockerfiles, and how to assemble the same root filesystems without an engine."""
