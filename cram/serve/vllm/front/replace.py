"""Another bundle on a running server, by the same road as the first: export, load, route.

`POST /v1/cram/bundle` with {"name": folder} and the admin token. The new groups are loaded beside the old
ones under their own names, and only then the router changes. So a request sees the old bundle or the new one,
and whatever fails leaves the old one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers

from cram.serve.vllm.base import check_checkpoint
from cram.serve.vllm.export import Adapter, export_groups
from cram.serve.vllm.front.routing import BundleRouter

ADMIN = "/v1/cram/bundle"
TOKEN, BUNDLES, EXPORT = "CRAM_ADMIN_TOKEN", "CRAM_BUNDLES", "CRAM_EXPORT"
PROTOCOL = "vllm.entrypoints.serve.lora.protocol"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Result = tuple[int, Any, BundleRouter | None]


class Replacer:
    """Replaces the bundle of one server; one replacement at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._before: set[str] = set()

    async def replace(
        self, scope: MutableMapping[str, Any], body: bytes | None, router: BundleRouter | None
    ) -> Result:
        """Try to make a bundle current.

        Args:
            scope: The HTTP request.
            body: Its body.
            router: The router of the moment.

        Returns:
            Status, the answer or the reason of a refusal, and the new router, if there is one.
        """
        token, given = os.environ.get(TOKEN), Headers(scope=scope).get("authorization", "")
        if not token:
            return 404, f"the server must be started with {TOKEN} to take bundles, got none", None
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return 401, "the admin token must be given, got another", None
        try:
            folder = bundle_folder(body)
            async with self._turn:
                made = await self._load(scope, folder, router)
        except (ValueError, OSError) as error:
            return 400, f"cram: the bundle was refused, the one before stays: {error}", None
        names = [adapter.name for adapter in made.adapters]
        return 200, {"object": "cram.bundle", "experts": made.names, "adapters": names}, made

    async def _load(
        self, scope: MutableMapping[str, Any], folder: Path, router: BundleRouter | None
    ) -> BundleRouter:
        models = served_models(scope)
        await asyncio.to_thread(check_served, scope, folder)
        out = Path(os.environ[EXPORT])
        adapters = await asyncio.to_thread(export_groups, folder, out)
        encoder = None if router is None else router.encoder
        made = await asyncio.to_thread(BundleRouter.load, folder, out, encoder)
        current = set() if router is None else {adapter.name for adapter in router.adapters}
        loaded: list[str] = []
        try:
            for adapter in adapters:
                if adapter.name not in models.lora_requests:
                    await _load_adapter(models, adapter, out)
                    loaded.append(adapter.name)
        except ValueError:
            await _unload(models, loaded)
            raise
        names = {adapter.name for adapter in adapters}
        # Requests that were routed a moment ago still name the adapters of the bundle before.
        await _unload(models, self._before - names - current)
        self._before = current - names
        return made


def bundle_folder(body: bytes | None) -> Path:
    """The folder that a request names.

    Raises:
        ValueError: If it does not name a folder among the server's bundles.
    """
    root = os.environ.get(BUNDLES)
    if not root:
        raise ValueError(f"the server must be started with --bundles ({BUNDLES}), got none")
    try:
        data = json.loads(body or b"")
    except (ValueError, RecursionError):
        data = None
    name = data.get("name") if isinstance(data, dict) and data.keys() == {"name"} else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError('the body must be {"name": the name of a bundle}, got another')
    folder = Path(root) / name
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"name must be that of a folder among the bundles, got {name!r}")
    return folder


def served_models(scope: MutableMapping[str, Any]) -> Any:
    """vLLM's list of served models, which loads adapters.

    Raises:
        ValueError: If the application is not that of `vllm serve`.
    """
    models = getattr(getattr(scope.get("app"), "state", None), "openai_serving_models", None)
    if models is None or not hasattr(models, "load_lora_adapter"):
        raise ValueError(
            "a bundle must be given to the server that runs vLLM, got a proxy or another version"
        )
    return models


def check_served(scope: MutableMapping[str, Any], bundle: Path) -> None:
    """Refuse a bundle of another base than the server's.

    Raises:
        ValueError: As `check_checkpoint`.
        OSError: If the base cannot be read.
    """
    arguments = getattr(scope["app"].state, "args", None)
    base = served_models(scope).base_model_paths[0].model_path
    check_checkpoint(base, bundle, getattr(arguments, "revision", None))


async def _load_adapter(models: Any, adapter: Adapter, out: Path) -> None:
    protocol = import_module(PROTOCOL)
    request = protocol.LoadLoRAAdapterRequest(
        lora_name=adapter.name, lora_path=str((out / adapter.name).resolve())
    )
    answer = await models.load_lora_adapter(request)
    if not isinstance(answer, str):
        raise ValueError(answer.error.message)


async def _unload(models: Any, names: Any) -> None:
    for name in names:
        protocol = import_module(PROTOCOL)
        await models.unload_lora_adapter(protocol.UnloadLoRAAdapterRequest(lora_name=name))
