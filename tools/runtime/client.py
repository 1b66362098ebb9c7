"""Talks to a running ComfyUI: queues a prompt, follows its progress, fetches its pictures."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp

from . import RunError
from .server import Server
from .workflow import Json

Report = Callable[[str, int, int], None]  # a node's id, the step it is at, and how many it has


class Client:
    """``async with Client(server) as client:``, once a server is up."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._id = uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self._http = aiohttp.ClientSession(self.server.url, timeout=aiohttp.ClientTimeout(total=None, sock_connect=30))
        self._events = await self._http.ws_connect("/ws", params={"clientId": self._id}, max_msg_size=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def info(self) -> Json:
        """Every node that the server has."""
        async with self._http.get("/object_info") as answer:
            return await answer.json()

    async def run(self, prompt: Json, report: Report | None = None) -> dict[str, list[bytes]]:
        """Queue a prompt, wait for it, and return the picture files that each of its output nodes saved."""
        try:
            number = await self._queue(prompt)
            await self._follow(number, prompt, report)
            async with self._http.get(f"/history/{number}") as answer:
                outputs = (await answer.json())[number]["outputs"]
            pictures: dict[str, list[bytes]] = {}
            for node, kept in outputs.items():
                pictures[node] = [await self._picture(entry) for entry in kept.get("images", [])]
            return pictures
        except aiohttp.ClientError as error:
            await self._complain_if_gone()
            raise RunError(f"ComfyUI does not answer any more ({error}). {self.server.last_words()}") from None

    async def _queue(self, prompt: Json) -> str:
        async with self._http.post("/prompt", json={"prompt": prompt, "client_id": self._id}) as answer:
            told = await answer.json()
        if told.get("node_errors") or "prompt_id" not in told:  # some outputs may have been accepted: all must be
            raise RunError(rejection(told))
        return told["prompt_id"]

    async def _follow(self, number: str, prompt: Json, report: Report | None) -> None:
        async for message in self._events:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # previews are binary
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") != number:
                continue
            if event["type"] == "progress" and report:
                report(str(data["node"]), data["value"], data["max"])
            elif event["type"] == "execution_error":
                raise RunError(
                    f"ComfyUI could not run {_name(data.get('node_id'), prompt)}: {str(data.get('exception_message')).strip()}"
                )
            elif event["type"] == "execution_interrupted":
                raise RunError("ComfyUI was told to interrupt the workflow.")
            elif event["type"] == "executing" and data.get("node") is None:
                return  # the history is complete when this is sent
        await self._complain_if_gone()
        raise RunError(f"ComfyUI closed the connection. {self.server.last_words()}")

    async def _complain_if_gone(self) -> None:
        await asyncio.sleep(0.5)  # a process that is dying needs a moment until it is dead
        self.server.check_alive("while it ran the workflow")

    async def _picture(self, entry: dict[str, str]) -> bytes:
        async with self._http.get("/view", params=entry) as answer:
            answer.raise_for_status()
            return await answer.read()


def _name(number: Any, prompt: Json) -> str:
    node = prompt.get(str(number), {"class_type": "a node"})
    title = node.get("_meta", {}).get("title")
    return f"'{title}' (node {number})" if title else f"{node['class_type']} (node {number})"


def rejection(answer: Json, longest: int = 300) -> str:
    """What ComfyUI had against a prompt, in plain words."""
    reasons = []
    for number, found in (answer.get("node_errors") or {}).items():
        for error in found.get("errors", []):
            details = f" ({error['details']})" if error.get("details") else ""
            reasons.append(f"{found.get('class_type')} (node {number}): {error.get('message')}{details}")
    if not reasons:
        error = answer.get("error") or {}
        reasons = [error.get("message", "it gave no reason") if isinstance(error, dict) else str(error)]
    shortened = [reason if len(reason) <= longest else reason[:longest] + "…" for reason in reasons]
    return "ComfyUI rejected the workflow: " + "; ".join(shortened)
