"""Captured maps in a real ComfyUI, whose cache keeps nodes and whose queue may be stopped: each picture gets its own maps."""

import asyncio
import copy
import urllib.request

import aiohttp
import pytest

from attune.tests.helpers import run_prompt
from attune.tools.runtime import RunError
from attune.tools.runtime.client import Client
from attune.tools.runtime.setup import ROOT
from attune.tools.runtime.workflow import read, to_prompt

EXAMPLE = ROOT / "example_workflows" / "07 Even guidance, and where words look.json"


@pytest.fixture(scope="module")
def nodes(info) -> dict:
    """The example as a prompt of two steps and one picture."""
    prompt = to_prompt(read(EXAMPLE), info)
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = 1
    return prompt


def number(prompt: dict, kind: str, **inputs: object) -> str:
    """The id of the one node of a class (and with the links given)."""
    (found,) = [n for n, node in prompt.items() if node["class_type"] == kind and inputs.items() <= node["inputs"].items()]
    return found


def sampler(prompt: dict) -> str:
    return number(prompt, "KSampler", model=[number(prompt, "AttuneSemanticCFG"), 0])


def heat(prompt: dict) -> str:
    return number(prompt, "SaveImage", images=[number(prompt, "AttuneShowMaps"), 0])


def changed(prompt: dict, node: str, **inputs: object) -> dict:
    out = copy.deepcopy(prompt)
    out[node]["inputs"] |= inputs
    return out


def test_a_cached_sampler_still_has_its_maps(nodes, server):
    first, _ = run_prompt(server, changed(nodes, sampler(nodes), seed=11))
    again, steps = run_prompt(
        server, changed(changed(nodes, sampler(nodes), seed=11), number(nodes, "AttuneShowMaps"), view="per layer")
    )
    assert steps == []  # nothing sampled again
    assert again[heat(nodes)] and again[heat(nodes)] != first[heat(nodes)]


def test_a_second_run_gets_the_second_run_s_maps_and_a_repeated_one_the_same(nodes, server):
    one, two = (changed(nodes, sampler(nodes), seed=s) for s in (21, 22))
    first, second, third = (run_prompt(server, p)[0][heat(nodes)] for p in (one, two, one))
    assert first != second
    assert first == third


def test_two_entries_of_the_queue(nodes, server):
    """Both are queued before the first one ends."""
    prompts = [changed(nodes, sampler(nodes), seed=s) for s in (31, 32)]

    async def both() -> list:
        async with Client(server) as one, Client(server) as two:
            return await asyncio.gather(one.run(prompts[0]), two.run(prompts[1]))

    at_once = [pictures[heat(nodes)] for pictures in asyncio.run(both())]
    assert at_once == [run_prompt(server, p)[0][heat(nodes)] for p in prompts]


def test_an_interrupted_run_leaves_nothing(nodes, server):
    long = changed(nodes, sampler(nodes), seed=41, steps=2000)
    stopped = False

    async def job() -> None:
        nonlocal stopped

        def stop(node: str, value: int, _: int) -> None:
            nonlocal stopped
            if node == sampler(nodes) and value >= 2 and not stopped:
                stopped = True
                request = urllib.request.Request(
                    f"{server.url}/interrupt", data=b"{}", headers={"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=30).close()

        async with Client(server) as client:
            await client.run(long, stop)

    with pytest.raises(RunError, match="interrupt"):
        asyncio.run(job())
    assert stopped
    short = changed(nodes, sampler(nodes), seed=42)
    after = run_prompt(server, short)[0][heat(nodes)]
    run_prompt(server, changed(nodes, sampler(nodes), seed=43))
    assert after == run_prompt(server, short)[0][heat(nodes)]


def test_another_sampler_s_picture_is_refused_by_name(nodes, server):
    plain = number(nodes, "VAEDecode", samples=[number(nodes, "KSampler", model=[number(nodes, "AttuneDemoModel"), 0]), 0])
    with pytest.raises(RunError, match=r"Show Attention Maps.*these attention maps belong to another picture"):
        run_prompt(server, changed(nodes, number(nodes, "AttuneShowMaps"), image=[plain, 0]))
    assert run_prompt(server, nodes)[0][heat(nodes)]  # the server is still up


def test_words_of_another_prompt_are_refused(nodes, server):
    words = number(nodes, "AttuneWords")
    with pytest.raises(RunError, match=r"“bench” is not in the prompt. It has these words: .*circle"):
        run_prompt(server, changed(nodes, words, words="bench"))
    long = "a red star and a blue circle " * 20
    other = copy.deepcopy(nodes)
    other["99"] = {"class_type": "AttuneWords", "inputs": {**nodes[words]["inputs"], "text": long, "words": "star"}}
    with pytest.raises(RunError, match="they are of different prompts"):
        run_prompt(server, changed(other, number(nodes, "AttuneShowMaps"), words=["99", 0]))


class Listener(Client):
    """A client that also keeps what nodes say on themselves, as the editor shows it."""

    async def __aenter__(self) -> "Listener":
        await super().__aenter__()
        self.said: list[str] = []
        self._events = self._listen(self._events)
        return self

    async def _listen(self, events):
        async for message in events:
            if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == (3).to_bytes(4, "big"):  # a text
                length = int.from_bytes(message.data[4:8], "big")
                self.said.append(f"{message.data[8 : 8 + length].decode()}: {message.data[8 + length :].decode()}")
            yield message


def test_the_report_states_the_bytes_and_the_limit_holds(nodes, server):
    prompt = copy.deepcopy(nodes)
    capture = number(prompt, "AttuneSemanticCFG")
    prompt[capture] = {
        "class_type": "AttuneAttentionMaps",
        "inputs": {"model": prompt[capture]["inputs"]["model"], "layers": "auto", "kind": "both", "steps": "mean",
                   "precision": "fp16", "keep_on": "cpu", "limit_mb": 100},
    }  # fmt: skip

    async def job() -> list[str]:
        async with Listener(server) as client:
            await client.run(prompt)
            return client.said

    words = 3 * 256 * 4 * 77 + 6 * 64 * 4 * 77  # sites x pixels x heads x columns, at 16 x 16 and at 8 x 8
    pixels = 3 * 256 * 256 + 6 * 64 * 64  # heads averaged
    assert asyncio.run(job()) == [f"{capture}: {2 * (words + pixels) / 2**20:.1f} MB of attention maps (18 maps)"]
    tight = changed(prompt, capture, kind="both", limit_mb=1, steps="every step", precision="fp32")
    tight[number(prompt, "EmptyLatentImage")]["inputs"]["batch_size"] = 8
    with pytest.raises(RunError, match=r"would hold more than \d+ MB for this picture, and the limit is 1 MB"):
        run_prompt(server, tight)
