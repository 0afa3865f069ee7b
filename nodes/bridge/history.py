"""Read-only routes for the front end's history of runs: what output/nibble holds, and nothing else.

GET /nibble/runs         -> {"runs": [one row a saved run, newest first]}
GET /nibble/runs/{name}  -> that run, as it was saved
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path

import folder_paths
from aiohttp import web
from server import PromptServer

from ...profiling.report import MAX_BYTES, Run, from_json
from ...reading.names import shown
from . import records

SHOWN = 100  # rows; older runs stay in the folder


def add_routes() -> None:
    """Adds the routes to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/nibble/runs")(_list)
        server.routes.get("/nibble/runs/{name}")(_one)


async def _list(_request: web.Request) -> web.Response:
    return web.json_response({"runs": await asyncio.to_thread(rows)})


async def _one(request: web.Request) -> web.Response:
    try:
        run = await asyncio.to_thread(read, request.match_info["name"])
    except LookupError as e:
        return web.json_response({"error": e.args[0]}, status=404)
    except OSError:
        return web.json_response({"error": "the file cannot be read. See its permissions"}, status=422)
    except ValueError as e:
        return web.json_response({"error": str(e)}, status=422)
    return web.Response(text=run.to_json(), content_type="application/json")


def rows() -> list[dict]:
    """The newest `SHOWN` runs in a line each; one that cannot be read has an ``error`` in place of its figures."""
    out = []
    for name in records.saved()[:SHOWN]:
        row = {"name": name}
        try:
            path = inside(name)
            stat = path.stat()
            row |= {"saved": stat.st_mtime, **_summary(path, stat.st_mtime_ns, stat.st_size)}
        except ValueError as e:
            row["error"] = str(e)
        except OSError:
            row["error"] = f"{shown(name)}: the file cannot be read"
        out.append(row)
    return out


@lru_cache(maxsize=4 * SHOWN)
def _summary(path: Path, _changed: int, size: int) -> dict:
    """A run's figures; read again only when the file changes. Callers copy it."""
    run = _read(path, size)
    ran = sum(n.state in ("ran", "stopped") for n in run.nodes)
    return {
        "label": run.label, "state": run.state, "seconds": run.seconds, "peak": run.peak, "limit": run.device.limit,
        "device": run.device.name, "ran": ran, "nodes": len(run.nodes),
    }  # fmt: skip


def read(name: str) -> Run:
    """The saved run ``name``. Raises LookupError for a name that is not in the list, ValueError for a file that is no
    run, OSError for one that cannot be read.
    """
    if not records.is_saved(name):
        raise LookupError("there is no such saved run. Choose one from the list")
    path = inside(name)
    return _read(path, path.stat().st_size)


def inside(name: str) -> Path:
    """A listed run's file. Raises ValueError for a link that leads out of the folder."""
    folder = Path(folder_paths.get_output_directory()) / records.FOLDER
    if not folder_paths.is_within_directory(str(folder), str(folder / name)):
        raise ValueError(f"{shown(name)} leads out of the folder of saved runs. Delete it")
    return folder / name


def _read(path: Path, size: int) -> Run:
    if size > MAX_BYTES:
        raise ValueError(f"{shown(path.name)}: it is larger than a profile can be. Delete it or move it away")
    try:
        return from_json(path.read_text(encoding="utf-8"), shown(path.name))
    except UnicodeDecodeError as e:
        raise ValueError(f"{shown(path.name)}: it is not text. Delete it or move it away") from e
