"""`khet predict`: ask the running service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from configs.errors import ConfigError, ExternalError, IntegrityError
from configs.settings import load_settings
from flows.terminal import print_json, print_table


def predict(photos: list[Path], *, as_json: bool) -> None:
    """Send each photo to the gateway and show the answers.

    Raises:
        ConfigError: no service is configured.
        IntegrityError: the service says that a file is not a usable photo.
        ExternalError: the service does not answer.
    """
    gateway = load_settings().cluster.gateway_url
    if gateway is None:
        raise ConfigError("No service is configured. Next: `khet up`, then `khet release`.")
    with httpx.Client(base_url=gateway, timeout=30) as client:
        answers = {str(photo): _ask(client, photo) for photo in photos}
    if as_json:
        print_json(answers)
        return
    rows = [
        [name, a["class"], f"{a['probability']:.1%}", "yes" if a["is_leaf"] else "no", a["model_version"]]
        for name, a in answers.items()
    ]
    print_table("", ["photo", "class", "probability", "looks like a leaf", "model"], rows)


def _ask(client: httpx.Client, photo: Path) -> dict[str, Any]:
    try:
        answer = client.post(
            "/predict", content=photo.read_bytes(), headers={"Content-Type": "application/octet-stream"}
        )
    except OSError as error:
        raise ConfigError(f"{photo} cannot be read: {error}.") from error
    except httpx.HTTPError as error:
        raise ExternalError(
            f"The service at {client.base_url} does not answer: {error}. Next: `khet status`."
        ) from error
    if 400 <= answer.status_code < 500:
        raise IntegrityError(f"The service refused {photo}: {answer.text}")
    if answer.status_code != 200:
        raise ExternalError(f"The service answered {answer.status_code} for {photo}: {answer.text[:300]}")
    return dict(answer.json())
