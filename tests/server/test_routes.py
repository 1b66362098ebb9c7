"""What the server answers the editor, without a browser."""

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
