"""Sets of images: sources, published split files, few-shot choices, halves of the classes, views, batches by step."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from metajax.core.errors import UserError
from metajax.vision.data.batches import caption_batches, prompt_batches, random_view, texts_of_sets, viewer
from metajax.vision.data.emoji import LEAST, assign
from metajax.vision.data.sets import Item, content_of, few_shot, part_of_classes
from metajax.vision.data.sources import open_images
from metajax.vision.data.words import WordTokenizer


@pytest.fixture
def folder(tmp_path):
    """Three classes of 12 images of one colour each."""
    for label, name in enumerate(("dark_red", "green", "pale_blue")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for n in range(12):
            pixels = np.zeros((20, 30, 3), np.uint8)
            pixels[..., label] = 20 * n
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{n}.png")
    return tmp_path


def test_a_folder_of_folders_is_a_set(folder):
    images = open_images("folder:set", folder, folder)
    assert images.classes == ("dark red", "green", "pale blue")
    train, test = images.splits["train"], images.splits["test"]
    assert len(train) + len(test) == 36 and min(len(train), len(test)) > 9 and not {i.key for i in train} & {i.key for i in test}
    assert np.asarray(images.read(test[0].key)).shape == (20, 30, 3)
    with pytest.raises(UserError, match="is not a folder"):
        open_images("folder:elsewhere", folder, folder)
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        open_images("emojis", folder, None)


def test_images_with_texts_beside_them_are_for_a_clip_to_learn_from(tmp_path):
    for name, text in {"a": "a  red\nsquare ", "deep/b": "two {} braces"}.items():
        file = tmp_path / "pairs" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(file)
        file.with_suffix(".txt").write_text(text)
    images = open_images("captions:pairs", tmp_path, tmp_path)
    assert [images.name_of(item) for item in images.splits["pretrain"]] == [
        "a red square",
        "two {} braces",
    ] and not images.classes
    told = []
    batches = caption_batches([images], 0, 2, viewer(4, "centre", 1.0), lambda text: told.append(text) or np.zeros(2, np.int32))
    assert batches[0]["pixels"].shape == (2, 4, 4, 3) and sorted(told) == ["a red square", "two {} braces"]
    (tmp_path / "pairs" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.png has no text beside it"):
        open_images("captions:pairs", tmp_path, tmp_path)


def test_published_split_files_say_what_is_in_a_set(tmp_path):
    rows = {"train": [["a/1.jpg", 1, "Forest"], ["a/2.jpg", 0, "River"]], "val": [], "test": [["a/3.jpg", 1, "Forest"]]}
    with pytest.raises(UserError, match=r"split_zhou_EuroSAT\.json"):
        open_images("eurosat", tmp_path, tmp_path)
    (tmp_path / "eurosat" / "2750" / "a").mkdir(parents=True)
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "eurosat" / "2750" / "a" / "3.jpg")
    images = open_images("eurosat", tmp_path, tmp_path)
    assert images.classes == ("River", "Forest") and images.template == "a centered satellite photo of {}."
    assert images.splits["test"] == (Item("a/3.jpg", 1),)
    assert images.read("a/3.jpg").size == (8, 8)


def test_imagenet_and_its_variants_share_names(tmp_path):
    synsets = {"n01": "tench", "n02": "great white shark", "n03": "hen"}
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "classnames.txt").write_text("".join(f"{s} {name}\n" for s, name in synsets.items()))
    for place in ("imagenet/images/train", "imagenet/images/val"):
        for synset in synsets:
            (tmp_path / place / synset).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / place / synset / "x.png")
    for place, names in {
        "imagenet-rendition/imagenet-r": ("n01", "n03"),
        "imagenetv2/imagenetv2-matched-frequency-format-val": ("0", "2"),
    }.items():
        for name in names:
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / place / name / "x.png")
    whole = open_images("imagenet", tmp_path, tmp_path)
    assert whole.classes == tuple(synsets.values()) and [i.label for i in whole.splits["test"]] == [0, 1, 2]
    for name in ("imagenet_r", "imagenet_v2"):
        variant = open_images(name, tmp_path, tmp_path)
        assert variant.classes == ("tench", "hen"), "only the present classes"
        assert [i.label for i in variant.splits["test"]] == [0, 1]


def test_emoji_classes_are_large_subcategories_and_each_emoji_has_one_split():
    entries = [{"code": f"{n:X}", "name": f"RED BIRD-{n}", "subcategory": "animal-bird"} for n in range(LEAST)]
    entries += [{"code": f"{n:X}", "name": "CUP & SAUCER", "subcategory": "drink"} for n in range(100, 160)]
    entries += [{"code": "F00", "name": "LONE", "subcategory": "rare"}]
    classes, splits = assign(entries)
    assert classes == ("animal bird", "drink")
    keys = [item.key for items in splits.values() for item in items]
    assert sorted(keys) == list(range(len(entries)))
    assert all(len(items) > 10 for items in splits.values())
    (lone,) = [item for item in splits["pretrain"] if item.label == -1]
    assert lone.caption == "lone" and {i.caption for i in splits["test"]} & {"cup and saucer"}
    assert assign(entries[:-1])[1]["test"] == splits["test"], "adding an emoji changes no other split"


def test_few_shot_choices_and_halves_of_the_classes():
    digits = open_images("digits", None, None)
    chosen = few_shot(digits.splits["train"], 3, seed=1)
    assert sorted(np.bincount([i.label for i in chosen]).tolist()) == [3] * 10
    assert chosen == few_shot(digits.splits["train"], 3, seed=1) != few_shot(digits.splits["train"], 3, seed=2)
    assert few_shot(digits.splits["train"], 0, seed=1) == digits.splits["train"]
    assert len(few_shot(digits.splits["train"][:4], 16, seed=1)) == 4
    base, new = (part_of_classes(digits, part) for part in ("base", "new"))
    assert base.classes == digits.classes[:5] and new.classes == digits.classes[5:]
    assert {i.label for i in new.splits["test"]} == set(range(5)), "new classes are numbered from 0"
    assert len(base.splits["test"]) + len(new.splits["test"]) == len(digits.splits["test"])
    assert len(part_of_classes(part_of_classes(digits, "base"), "base").classes) == 3, "the first half is rounded up"


def test_batches_are_a_function_of_the_step_and_epochs_are_whole():
    digits = part_of_classes(open_images("digits", None, None), "base")
    items = few_shot(digits.splits["train"], 3, seed=0)
    make = lambda seed: prompt_batches(digits, items, seed, 2, viewer(16, "crop", 0.3), paired=True)  # noqa: E731
    batches, again = make(0), make(0)
    for step in (0, 6, 7, 20):
        for name, values in batches[step].items():
            np.testing.assert_array_equal(values, again[step][name])
    epochs = [[i for step in range(7 * e, 7 * e + 7) for i in batches[step]["index"].tolist()] for e in range(2)]
    assert all(len(set(epoch)) == 14 for epoch in epochs) and epochs[0] != epochs[1], "15 items make 7 whole batches"
    assert np.any(make(1)[0]["pixels"] != batches[0]["pixels"])
    by_pixels = {digits.read(i.key).resize((1, 1)).tobytes(): i.label for i in items}
    assert batches[0]["pixels"].shape == (2, 2, 16, 16, 3) and len(by_pixels) > 1


def test_the_pair_is_always_of_another_class():
    digits = open_images("digits", None, None)
    items = few_shot(digits.splits["train"], 2, seed=0)
    shown = type(digits)(**{**vars(digits), "read": lambda key: Image.new("RGB", (8, 8), (key % 256, key // 256, 0))})
    batches, label_of = prompt_batches(shown, items, 0, 1, viewer(8, "centre", 1.0), paired=True), {i.key: i.label for i in items}
    seen = []
    for step in range(200):
        batch = batches[step]
        first, second = (int(p[0, 0, 0]) + 256 * int(p[0, 0, 1]) for p in batch["pixels"][0])
        assert label_of[first] == batch["label"][0] != label_of[second]
        seen.append(label_of[second])
    assert np.bincount(seen, minlength=10).min() > 8, "other classes are about equally frequent"


def test_random_views_have_the_size_and_the_share():
    rng, image = np.random.default_rng(0), Image.fromarray(np.indices((40, 60)).sum(0).astype(np.uint8))
    spans = [int(np.ptp(random_view(image, 16, rng, 0.08)[..., 0])) for _ in range(60)]
    assert min(spans) < 40 < max(spans) <= 98, "small parts and large ones"
    assert random_view(Image.new("L", (200, 2), 7), 16, rng, 0.9).tolist() == [[[7] * 3] * 16] * 16, (
        "without a fitting shape, the centre"
    )


def test_captions_and_the_words_of_a_small_clip():
    digits = open_images("digits", None, None)
    tokenizer = WordTokenizer.of(texts_of_sets([digits]))
    row = tokenizer.tokenize(["A photo of a Three."], 10)[0]
    assert tokenizer.decode(row.tolist()) == "<start> a photo of a three . <end> <pad> <pad>" and row.argmax() == 7
    assert tokenizer.encode("zebra") == [1]
    with pytest.raises(UserError, match="but a text has 4"):
        tokenizer.tokenize(["a photo of a three."], 4)
    batch = caption_batches([digits], 0, 6, viewer(8, "centre", 1.0), lambda text: tokenizer.tokenize([text], 12)[0])[0]
    assert batch["pixels"].shape == (6, 8, 8, 3) and batch["tokens"].shape == (6, 12)
    assert not np.any(batch["tokens"] == 1), "no unknown word in training"


@pytest.mark.fault(18)
def test_every_class_folder_has_images_or_is_named(folder, capsys):
    (folder / "set" / "yellow").mkdir()
    with pytest.raises(UserError, match=r"/set/yellow has no image"):
        open_images("folder:set", folder, folder)
    (folder / "set" / "yellow" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match=r"/set/yellow has no image"):
        open_images("folder:set", folder, folder)
    for n in range(4):
        Image.new("RGB", (8, 8), "yellow").save(folder / "set" / "yellow" / f"{n}.gif")
    (folder / "set" / ".cache").mkdir()
    (folder / "set" / "yellow" / ".DS_Store").write_bytes(b"x")
    assert open_images("folder:set", folder, folder).classes == ("dark red", "green", "pale blue", "yellow")
    assert "yellow: 1 entries are no images and are left out, such as notes.txt" in capsys.readouterr().err
    for split in ("train", "test"):
        (folder / "set" / split).mkdir()
    for split, names in {"train": ("red", "green"), "test": ("red",)}.items():
        for name in names:
            (folder / "set" / split / name).mkdir()
            Image.new("RGB", (8, 8)).save(folder / "set" / split / name / "0.png")
    with pytest.raises(UserError, match=r"/set/test has no folder green"):
        open_images("folder:set", folder, folder)


@pytest.mark.fault(16)
def test_sets_differ_by_the_content_of_their_files(folder):
    images = open_images("folder:set", folder, folder)
    first, path = content_of(images, "train", "test"), folder / "set" / images.splits["train"][0].key
    status, size = path.stat(), Image.open(path).size
    pixels = np.asarray(images.read(images.splits["train"][0].key)).copy()
    pixels[..., 2] = 255 - pixels[..., 2]
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data + bytes(max(0, status.st_size - len(data))))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Image.open(path).size == size and content_of(images, "train", "test") != first
    digits = open_images("digits", None, None)
    assert content_of(digits, "train", "test") == digits.fingerprint, "a set without files has nothing to read"


@pytest.mark.fault(34)
def test_damaged_images_are_named_before_anything_is_trained(folder):
    images = open_images("folder:set", folder, folder)
    broken = folder / "set" / images.splits["test"][1].key
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{broken.name}: not a whole image"):
        content_of(images, "train", "test")
    assert content_of(images, "train") != content_of(images)


@pytest.mark.fault(34)
def test_malformed_published_lists_are_named(tmp_path):
    (tmp_path / "eurosat").mkdir()
    for content in (
        "{",
        "[]",
        '{"train": 3}',
        '{"train": [["a", 1]], "val": [], "test": []}',
        '{"train": [["a", 7, "x"]], "test": []}',
    ):
        (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(content)
        with pytest.raises(UserError, match=r"eurosat: its lists .* are not the published ones"):
            open_images("eurosat", tmp_path, tmp_path)
