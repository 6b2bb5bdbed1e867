"""Prefect tasks around datasets."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.settings import settings
from tasks.datasets import fetch_dataset
from tasks.prefect_support import RETRY_DELAYS, retry_external, show_table


@task(
    name="check-data",
    task_run_name="check-data-{name}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=6 * 3600,
)
def check_data(release_id: str, name: str) -> Path:
    """Bring the dataset here, verified against the object store; returns its folder.

    Raises:
        ConfigError: there is no such dataset.
        IntegrityError: its files do not match its manifest.
    """
    dataset = fetch_dataset(name, settings())
    counts = [{"class": label, **splits} for label, splits in dataset.info.counts.items()]
    show_table(f"data-{release_id}", counts, f"Dataset {name}, manifest {dataset.manifest_hash[:12]}")
    return dataset.root
