import json
import re
import sys

import pytest

from dcache.errors import UsageError
from dcache.tasks.base import Problem
from dcache.tasks.prompts import Prompts


def write(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_prompts_keep_the_order_of_the_file_and_blank_lines_are_skipped(tmp_path):
    path = write(
        tmp_path, {"prompt": "b", "answer": 4}, "", {"prompt": "ä", "id": "x"}, {"prompt": "c", "answer": "4 "}
    )
    expected = [Problem("line-1", "b", "4"), Problem("x", "ä"), Problem("line-4", "c", "4 ")]
    assert Prompts(path).problems("test", None, seed=0) == expected
    assert Prompts(str(path)).problems("train", 2, seed=9) == expected[:2]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("4", True),
        (" 4\n", True),
        ("2 + 2 #### 4\nthat is it", True),
        ("####4", True),
        ("2 + 2 = 4", False),
        ("", False),
    ],
)
def test_the_answer_is_compared_with_what_follows_the_mark_or_with_everything(tmp_path, text, verdict):
    task = Prompts(write(tmp_path, {"prompt": "2 + 2", "answer": 4}))
    assert task.score(task.problems("test", 1, 0)[0], text) is verdict


def test_a_prompt_without_an_answer_is_not_scored(tmp_path):
    task = Prompts(write(tmp_path, {"prompt": "Tell me a story", "answer": None}))
    assert task.score(task.problems("test", 1, 0)[0], "#### 4") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2, column 15: not valid JSON"),
        ("[1, 2]", "line 2: expected an object"),
        ('"text"', "line 2: expected an object .* found a string"),
        ("{}", "line 2: the key 'prompt' is missing"),
        ('{"answer": "4"}', "line 2: the key 'prompt' is missing"),
        ('{"prompt": "a", "anwser": 4}', "line 2: unknown key 'anwser'; the keys are prompt, answer, id and images"),
        ('{"prompt": 4}', "line 2: 'prompt' must be a string, found a number"),
        ('{"prompt": null}', "line 2: 'prompt' must be a string, found null"),
        ('{"prompt": "  "}', "line 2: 'prompt' is empty"),
        ('{"prompt": "a", "answer": true}', "line 2: 'answer' must be a string or a number, found true or false"),
        ('{"prompt": "a", "answer": [4]}', "line 2: 'answer' must be a string or a number, found a list"),
        ('{"prompt": "a", "id": 3}', "line 2: 'id' must be a string, found a number"),
        ('{"prompt": "a", "id": "line-1"}', "line 2: id 'line-1' is taken"),
        ("[" * 200_000, "line 2: not valid JSON: it is nested too deeply"),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "line 2: not valid JSON: a number has too many digits"),
        (r'{"prompt": "a\ud800"}', r"line 2: 'prompt' holds a lone surrogate, '.ud800', at character 2"),
        (r'{"prompt": "a", "answer": "\udfff"}', "line 2: 'answer' holds a lone surrogate"),
        (r'{"prompt": "a", "id": "\udfff"}', "line 2: 'id' holds a lone surrogate"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_place(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(UsageError, match=message) as caught:
        Prompts(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(f"{path}: no prompts")):
        Prompts(path)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        Prompts(tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        Prompts(tmp_path / "binary.jsonl")


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(UsageError, match="at least 1"):
        Prompts(write(tmp_path, {"prompt": "a"})).problems("test", limit, 0)


def test_a_line_separator_within_a_prompt_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'.encode())
    assert [problem.prompt for problem in Prompts(path).problems("test", None, 0)] == ["a\u2028b", "c"]


@pytest.fixture
def picture(tmp_path):
    """Writes a small picture of one colour into the folder of the prompts, and returns it."""
    image = pytest.importorskip("PIL.Image")

    def save(name, colour=(200, 30, 30), mode="RGB"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        drawn = image.new(mode, (9, 5), colour)
        drawn.save(tmp_path / name)
        return drawn

    return save


def test_images_are_read_in_order_relative_to_the_file_and_as_they_are_stored(tmp_path, picture, monkeypatch):
    first, second = picture("a.png", (0, 0, 9)), picture("more/b.png", (1, 2, 3, 4), "RGBA")
    path = write(
        tmp_path, {"prompt": "<image><image>\nSame?", "images": ["a.png", "more/b.png"]}, {"prompt": "<image>"}
    )
    monkeypatch.chdir("/")
    shown, text = Prompts(path).problems("test", None, 0)
    assert [found.tobytes() for found in shown.images] == [first.tobytes(), second.tobytes()]
    assert [found.mode for found in shown.images[:]] == ["RGB", "RGBA"]
    assert shown.prompt == "<image><image>\nSame?"
    assert (len(shown.images), len(text.images)) == (2, 0)


@pytest.mark.parametrize("images", [None, []])
def test_no_images_are_a_prompt_of_text(tmp_path, images):
    (problem,) = Prompts(write(tmp_path, {"prompt": "a", "images": images})).problems("test", None, 0)
    assert not problem.images


def test_pixels_are_decoded_when_an_image_is_used_and_not_before(tmp_path, picture):
    picture("a.png")
    path = write(tmp_path, {"prompt": "<image>", "images": ["a.png"]})
    (problem,) = Prompts(path).problems("test", None, 0)
    new = picture("a.png", (7, 7, 7))
    assert problem.images[0].tobytes() == new.tobytes()
    (tmp_path / "a.png").unlink()
    with pytest.raises(UsageError, match=r"line 1: image .*a\.png: no such file") as caught:
        problem.images[0]
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        ("a.png", "<image>", "'images' must be a list of paths, found a string"),
        ([3], "<image>", "'images' must be a list of paths, found a number in it"),
        (["\ud800"], "<image>", "'images' holds a lone surrogate"),
        (["a.png"], "no place", "'prompt' has 0 <image>, and 'images' has 1 paths; write one <image>"),
        ([], "<image>", "'prompt' has 1 <image>, and 'images' has 0 paths"),
        (["a.png"], "<image><image>", "'prompt' has 2 <image>, and 'images' has 1 paths"),
        (["b.png"], "<image>", r"image .*b\.png: no such file; a path is relative to the file of prompts"),
        (["text.png"], "<image>", r"image .*text\.png: not an image in a format that Pillow knows"),
        (["empty.png"], "<image>", r"image .*empty\.png: not an image"),
        (["folder"], "<image>", r"image .*folder: cannot be read: .*directory"),
        (["a\x00.png"], "<image>", "cannot be read: embedded null"),
        (["", "a.png"], "<image><image>", "cannot be read: .*directory"),
    ],
)
def test_bad_images_are_refused_with_file_and_line_before_anything_runs(tmp_path, picture, images, prompt, message):
    picture("a.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, {"prompt": "fine"}, {"prompt": prompt, "images": images})
    with pytest.raises(UsageError, match=message) as caught:
        Prompts(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_a_truncated_image_is_refused_when_it_is_used(tmp_path, picture):
    image = pytest.importorskip("PIL.Image")
    image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (problem,) = Prompts(write(tmp_path, {"prompt": "<image>", "images": ["a.png"]})).problems("test", None, 0)
    with pytest.raises(UsageError, match=r"line 1: image .*a\.png: cannot be read: .*truncated"):
        list(problem.images)


@pytest.mark.parametrize("limit", [44, 20])  # Pillow itself warns up to twice its limit, and refuses beyond
def test_an_image_beyond_the_limit_of_pillow_is_refused(tmp_path, picture, monkeypatch, limit):
    picture("a.png")
    path = write(tmp_path, {"prompt": "<image>", "images": ["a.png"]})
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UsageError, match=rf"line 1: image .*a\.png: more than {limit} pixels, Pillow's limit"):
        Prompts(path)


def test_without_pillow_prompts_with_images_are_refused_and_others_are_not(tmp_path, picture, monkeypatch):
    picture("a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    Prompts(write(tmp_path, {"prompt": "a"}))
    with pytest.raises(UsageError, match=r"images need Pillow: pip install 'dcache\[vision\]'"):
        Prompts(write(tmp_path, {"prompt": "<image>", "images": ["a.png"]}))
