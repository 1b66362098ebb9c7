"""What the server answers the editor, without a browser."""

import asyncio
import threading
from weakref import WeakValueDictionary

import folder_paths
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from attune.server import help as help_pages
from attune.server import routes as browser


def test_routes_answer_bad_requests_with_a_sentence():
    for path, body, sentence in [
        ("/attune/layout", None, "The request is not a JSON object."),
        ("/attune/layout", {"preset": "sd9"}, "There is no preset “sd9”"),
        ("/attune/layout", {"preset": 3}, "“preset” must be a text."),
        ("/attune/layout", {}, "“folder” must be a text."),
        ("/attune/layout", {"folder": "loras", "file": "a.safetensors"}, "There is no model folder “loras”"),
        ("/attune/decompose", {"text": " "}, "The prompt is empty"),
        ("/attune/decompose", {"text": "a dog", "granularity": "word"}, "Unknown granularity"),
        ("/attune/decompose", {"text": "a dog", "manual": "cat | a dog"}, "Line 1 of manual: “cat” is not in its sub-prompt"),
        ("/attune/decompose", {"text": "a dog", "remove_then_add": "no"}, "“remove_then_add” must be true or false."),
        ("/attune/decompose", {"text": "a" * 30_000}, "“text” is longer than 20000 characters"),
        ("/attune/live", {"client": "x"}, "“on” must be true or false."),
    ]:
        found, status = browser.answer(browser.ROUTES[path], body)
        assert status == 400 and list(found) == ["error"] and found["error"].startswith(sentence), (path, body, found)


def test_the_demo_models_layout():
    found, status = browser.answer(browser.ask_layout, {"preset": "demo"})
    assert status == 200 and found["default"] == "middle.0.0:0-3"
    assert [name for name, heads in found["layers"] if heads == 4][:4] == ["input.1.0", "input.3.0", "input.4.0", "middle.0.0"]


def test_branches_come_as_manual_takes_them():
    lines = "* | a dog and a cat\ndog | a red dog and a cat\ncat | a dog and a blue cat"
    found, status = browser.answer(browser.ask_decompose, {"text": "a red dog and a blue cat", "manual": lines})
    assert status == 200
    assert "\n".join(f"{b['subject']} | {b['text']}" for b in found["branches"][1:]) == lines


def test_the_second_of_two_is_named_so():
    lines = "car #2 | a car and a red car"
    found, _ = browser.answer(browser.ask_decompose, {"text": "a car and a red car", "manual": lines})
    assert [b["subject"] for b in found["branches"]] == ["*", "car #2"]


# --- through aiohttp ----------------------------------------------------------------------------------------------------


def ask_server(questions, asks=None):
    """What the routes answer: ``questions(client)`` is a coroutine with an aiohttp client."""

    async def job():
        table = web.RouteTableDef()
        browser.add_routes(table)
        turns = WeakValueDictionary()
        for path, ask in (asks or {}).items():
            table.post(path)(browser.handler(ask, turns))
        app = web.Application()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            return await questions(client)

    return asyncio.run(job())


JSON = {"Content-Type": "application/json"}
BROKEN = [
    (b"{" * 100_000, JSON, "The request is not a JSON object."),
    (b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON, "The request is nested too deeply."),
    (b"[" * 100_000 + b"]" * 100_000, JSON, "The request is nested too deeply."),
    (
        b"{}",
        {"Content-Type": "application/json; charset=klingon"},
        "The request is in a character set that is not known: “klingon”.",
    ),
    (b'{"text": "\xff"}', JSON, "The request is not a JSON object."),
    (b'{"text": ' + b"9" * 5000 + b"}", JSON, "The request is not a JSON object."),
    (b"", JSON, "The request is not a JSON object."),
    (b'{"text": "a \\ud800 dog"}', JSON, "The text has half a character (U+D800)"),
    (b'{"text": "' + b"a" * 4001 + b'"}', JSON, "The prompt has 4001 characters; at most 4000"),
]


@pytest.mark.parametrize(("data", "headers", "sentence"), BROKEN, ids=range(len(BROKEN)))
def test_whatever_comes_is_answered_with_a_sentence(data, headers, sentence):
    async def questions(client):
        answer = await client.post("/attune/decompose", data=data, headers=headers)
        return answer.status, await answer.json()

    status, found = ask_server(questions)
    assert status == 400 and found["error"].startswith(sentence)


def test_links_in_a_circle_are_answered_with_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(tmp_path / name))
    found, status = browser.answer(browser.ask_layout, {"folder": "checkpoints", "file": "a.safetensors"})
    assert (status, list(found)) in ((400, ["error"]), (200, ["untold"])) and " " in str(*found.values())


def test_a_mistake_of_ours_is_a_sentence_too(caplog):
    def ask(body, check):
        raise KeyError("what")

    found, status = browser.answer(ask, {})
    assert status == 400 and "KeyError" in found["error"] and "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 200), ("http://127.0.0.1:8188", 200), ("null", 403), ("file://", 403), ("", 403), ("http://[x", 403)],
)
def test_pages_without_an_origin_are_refused(origin, status):
    async def questions(client):
        headers = {} if origin is None else {"Origin": origin}
        for path, body in (
            ("/attune/layout", {"preset": "demo"}),
            ("/attune/decompose", {"text": "a car", "manual": "* | a car"}),
        ):
            answer = await client.post(path, json=body, headers=headers)
            assert answer.status == status and ("error" in await answer.json()) == (status == 403)

    ask_server(questions)


def test_a_client_s_questions_are_answered_one_at_a_time():
    running, most, both = set(), [], threading.Event()

    def ask(body, check):
        running.add(body["n"])
        most.append(len(running))
        if len(running) == 2:
            both.set()
        both.wait(0.3)
        running.discard(body["n"])
        return {"n": body["n"]}

    async def questions(client):
        answers = await asyncio.gather(*(client.post("/slow", json={"n": n}) for n in range(3)))
        return [(await a.json())["n"] for a in answers]

    assert ask_server(questions, {"/slow": ask}) == [0, 1, 2]
    assert most == [1, 1, 1]


def test_work_for_a_client_that_has_left_stops():
    started, stopped = threading.Event(), threading.Event()

    def ask(body, check):
        started.set()
        for _ in range(500):
            try:
                check()
            except browser.Gone:
                stopped.set()
                raise
            threading.Event().wait(0.02)
        return {}

    async def questions(client):
        question = asyncio.ensure_future(client.post("/slow", json={}))
        while not started.is_set():
            await asyncio.sleep(0.01)
        question.cancel()
        await asyncio.get_running_loop().run_in_executor(None, stopped.wait, 8)

    ask_server(questions, {"/slow": ask})
    assert stopped.is_set()


def test_help_pages_lead_nowhere_else():
    async def job():
        table = web.RouteTableDef()
        help_pages.add_pages(table, ["a-pack"])
        application = web.Application()
        application.add_routes(table)
        application.add_routes([web.static("/extensions/a-pack", help_pages.WEB)])  # as ComfyUI, after ours
        async with TestClient(TestServer(application)) as client:
            get = lambda path: client.get(URL(f"/extensions/a-pack/docs/{path}", encoded=True))  # noqa: E731
            for path in ("AttuneFix/en.md", "AttuneFix/zh-TW.md", "AttuneFix/zh.md", "AttuneFix.md", "pictures/maps.jpg"):
                assert (await get(path)).status == 200, path
            for path in ("AttuneNone/en.md", "AttuneFix/..%2F..%2F..%2FREADME.md", "%2E%2E/README.md", "AttuneFix/e%00n.md"):
                assert (await get(path)).status in (400, 403, 404), path

    asyncio.run(job())
