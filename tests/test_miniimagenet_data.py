"""Data of the mini-ImageNet script: layouts, their faults, the cache, downloads, SYNTHETIC classes, episodes.

Everything runs on tiny generated data; the last test needs the real set and reads the environment variable
MODGRAD_DATA, the folder that holds mini-imagenet/.
"""

import csv
import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_miniimagenet as mini
from common import DataError, DownloadError, UsageError

COUNTS = {"train": 3, "val": 2, "test": 2}      # classes of the tiny data set
PER_CLASS, SIZE = 4, 12
PICKLE_NAMES = {"train": "train", "val": "validation", "test": "test"}


# --- tiny data in every layout ---

@pytest.fixture
def pixels():
    """{split: {class: uint8 (P, S, S, 3)}}, classes deliberately not in sorted order."""
    rng = np.random.default_rng(0)
    return {split: {f"n{split}{number}": rng.integers(0, 256, (PER_CLASS, SIZE, SIZE, 3), np.uint8)
                    for number in reversed(range(count))} for split, count in COUNTS.items()}


def write_csv(root, pixels):
    (root / "images").mkdir(parents=True)
    for split, classes in pixels.items():
        rows = [(f"{name}{number:03d}.png", name) for name, stack in classes.items()
                for number in reversed(range(len(stack)))]
        for filename, name in rows:
            Image.fromarray(classes[name][int(filename[-7:-4])]).save(root / "images" / filename)
        write_rows(root / f"{split}.csv", [("filename", "label"), *rows])


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def write_folders(root, pixels):
    for split, classes in pixels.items():
        for name, stack in classes.items():
            (root / split / name).mkdir(parents=True)
            for number, image in enumerate(stack):
                Image.fromarray(image).save(root / split / name / f"{number:03d}.PNG")


def write_cache_pickles(root, pixels, protocol=2):
    root.mkdir(parents=True, exist_ok=True)
    for split, classes in pixels.items():
        stack = np.stack(list(classes.values()), axis=1)        # images of the classes interleaved
        members = {name: list(range(row, stack.size // stack[0, 0].size, len(classes)))
                   for row, name in enumerate(classes)}
        content = {"image_data": stack.reshape(-1, *stack.shape[2:]), "class_dict": members}
        dump(root / f"mini-imagenet-cache-{PICKLE_NAMES[split]}.pkl", content, protocol)


def write_category_pickles(root, pixels, protocol=2):
    root.mkdir(parents=True, exist_ok=True)
    for split, classes in pixels.items():
        names = list(classes)
        content = {"data": np.concatenate([classes[name] for name in names]),
                   "labels": np.repeat(np.arange(len(names)) + 7, PER_CLASS).tolist(),
                   "catname2label": {name: number + 7 for number, name in enumerate(names)}}
        part = "train_phase_train" if split == "train" else split
        dump(root / f"miniImageNet_category_split_{part}.pickle", content, protocol)
    dump(root / "miniImageNet_category_split_train_phase_val.pickle", "not one of our splits", protocol)


def dump(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


WRITERS = {"csv": write_csv, "folders": write_folders, "cache": write_cache_pickles,
           "category": write_category_pickles}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("place", ["", "mini-imagenet", "unzipped/mini-imagenet"])
def test_every_layout_gives_the_same_arrays(tmp_path, pixels, layout, place):
    WRITERS[layout](tmp_path / place, pixels)
    for split, classes in pixels.items():
        loaded = mini.load_split(tmp_path, split, image_size=SIZE)
        assert loaded.names == sorted(classes)
        assert loaded.images.dtype == np.uint8 and not loaded.images.flags.writeable and not loaded.synthetic
        np.testing.assert_array_equal(loaded.images, np.stack([classes[name] for name in loaded.names]))
        assert f"{COUNTS[split]} classes x {PER_CLASS} images" in loaded.dataset
        assert f"not the standard {mini.STANDARD[split][0]} x 600" in loaded.dataset


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_numpy_pickles_load(tmp_path, protocol):
    array, rest = np.arange(6, dtype=np.uint8).reshape(2, 3), [1, "x", b"\xff", None, 0.5]
    content = {"a": array, "s": np.int64(3), "l": rest}
    for core in (b"numpy.core", b"numpy._core"):     # numpy 1 and 2; up to protocol 3 plain text
        raw = pickle.dumps(content, protocol=protocol)
        raw = re.sub(rb"numpy\._?core", core, raw) if protocol < 4 else raw
        (tmp_path / "a.pkl").write_bytes(raw)
        loaded = mini.load_pickle(tmp_path / "a.pkl")
        np.testing.assert_array_equal(loaded["a"], array)
        assert loaded["a"].dtype == np.uint8 and loaded["s"] == 3 and loaded["l"] == rest
        assert f"{core.decode()}.numeric _frombuffer" in mini._NumpyUnpickler.allowed       # protocol 5


def test_other_sizes_and_modes_become_square_rgb(tmp_path, pixels):
    write_folders(tmp_path, pixels)
    target = tmp_path / "train" / "ntrain0" / "000.PNG"
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 20), np.uint8))
    wide.save(target)
    loaded = mini.load_split(tmp_path, "train", image_size=6)
    assert loaded.images.shape == (3, PER_CLASS, 6, 6, 3)
    expected = np.asarray(wide.convert("RGB").resize((6, 6), Image.BICUBIC))
    np.testing.assert_array_equal(loaded.images[0, 0], expected)
    nearest = mini.load_split(tmp_path, "train", image_size=6, nearest=True).images[0, 0]      # beside the other's cache
    columns = (np.arange(6) + 0.5) * 20 // 6                                                   # that the new pixels' centres are in
    rows = (np.arange(6) + 0.5) * 9 // 6
    np.testing.assert_array_equal(nearest, np.asarray(wide.convert("RGB"))[np.ix_(rows.astype(int), columns.astype(int))])
    np.testing.assert_array_equal(mini.load_split(tmp_path, "train", image_size=6).images[0, 0], expected)


def test_the_flag_resizes_to_the_nearest_pixels(tmp_path, pixels, monkeypatch):
    write_folders(tmp_path / "data", pixels)
    flags = ["--image-size", str(SIZE // 2), "--resize-nearest"]
    splits, _, _ = mini.load_data(mini.parse_flags([*flags, "--data", str(tmp_path / "data")]), torch.device("cpu"))
    for split, classes in pixels.items():
        np.testing.assert_array_equal(splits[split].numpy(), np.stack([classes[name][:, 1::2, 1::2] for name in sorted(classes)]))
    monkeypatch.chdir(tmp_path / "data" / "val")                               # where no data set is
    with pytest.raises(UsageError, match="--resize-nearest is for images of mini-ImageNet"):
        mini.load_data(mini.parse_flags(flags), torch.device("cpu"))


def test_the_cache_serves_and_follows_its_inputs(tmp_path, pixels, monkeypatch):
    write_csv(tmp_path, pixels)
    first = mini.load_split(tmp_path, "val", image_size=SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(mini, "_decode", None)        # a second decoding would fail
        np.testing.assert_array_equal(mini.load_split(tmp_path, "val", image_size=SIZE).images, first.images)
    changed = np.full((SIZE, SIZE, 3), 9, np.uint8)
    Image.fromarray(changed).save(tmp_path / "images" / "nval0000.png")
    assert (mini.load_split(tmp_path, "val", image_size=SIZE).images[0, 0] == 9).all()


# --- faults ---

def edit_rows(edit, split="train"):
    def fault(root):
        rows = read_rows(root / f"{split}.csv")
        write_rows(root / f"{split}.csv", edit(rows))
    return fault


def truncate(root):
    path = root / "images" / "ntrain1002.png"
    path.write_bytes(path.read_bytes()[:-60])


def remove_images(root):
    for number in (0, 3):
        (root / "images" / f"ntest1{number:03d}.png").unlink()


CSV_FAULTS = {
    "unreadable": (lambda root: (root / "images" / "ntrain0001.png").write_bytes(b"text"),
                   r"ntrain0001\.png is not a readable image"),
    "truncated": (truncate, r"ntrain1002\.png is not a readable image"),
    "absent files": (remove_images, r"lacks 2 of the 28 files.*ntest1003\.png.*test\.csv line 2"),
    "missing csv": (lambda root: (root / "val.csv").unlink(), r"val\.csv is missing"),
    "columns": (edit_rows(lambda rows: [("file", "class"), *rows[1:]]),
                r"train\.csv: columns are \['file', 'class'\]"),
    "no header": (edit_rows(lambda rows: rows[1:]), r"columns are \['ntrain2003\.png', 'ntrain2'\]"),
    "row": (edit_rows(lambda rows: [*rows, ("a.png",)]), r"train\.csv line 14: \['a\.png'\] is not"),
    "duplicate": (edit_rows(lambda rows: [*rows, rows[3]]),
                  r"train\.csv line 14: ntrain2001\.png is already listed in train\.csv line 4"),
    "shared image": (edit_rows(lambda rows: [*rows, ("ntrain0000.png", "nval0")], "val"),
                     r"val\.csv line 10: ntrain0000\.png is already listed in train\.csv"),
    "short class": (edit_rows(lambda rows: rows[:-1]), r"train classes.* them, 4; ntrain0 has 3 \(1 short"),
    "overlap": (edit_rows(lambda rows: [[name, label.replace("nval0", "ntrain0")] for name, label in rows],
                          "val"), r"class ntrain0 is in both train and val"),
    "empty": (edit_rows(lambda rows: rows[:1], "test"), r"the test split is missing or empty"),
    "empty file": (edit_rows(lambda rows: []), r"columns are \[\]"),
    "encoding": (lambda root: (root / "train.csv").write_text((root / "train.csv").read_text(), encoding="utf-16"),
                 r"train\.csv cannot be read as a csv file in UTF-8"),
    "long field": (edit_rows(lambda rows: [*rows, ("a" * 140_000, "b")]), r"train\.csv cannot be read as a csv file"),
}


def test_csv_files_may_have_a_byte_order_mark_and_blank_lines(tmp_path, pixels):
    write_csv(tmp_path, pixels)
    text = (tmp_path / "val.csv").read_text()
    (tmp_path / "val.csv").write_text(text.replace("\n", "\n\n"), encoding="utf-8-sig")
    assert sorted(mini.load_split(tmp_path, "val", 8).names) == sorted(pixels["val"])


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_faults_of_the_csv_layout_are_named(tmp_path, pixels, fault):
    write_csv(tmp_path, pixels)
    damage, message = CSV_FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        mini.load_split(tmp_path, "train", image_size=SIZE)


def move_class(root):
    (root / "test" / "ntest0").rename(root / "val" / "ntrain2")


FOLDER_FAULTS = {
    "overlap": (move_class, r"class ntrain2 is in both train and val"),
    "stray": (lambda root: (root / "train" / "ntrain0" / "notes.txt").write_text("x"),
              r"notes\.txt is not a \.jpg"),
    "short": (lambda root: (root / "train" / "ntrain0" / "000.PNG").unlink(), r"ntrain0 has 3"),
    "missing": (lambda root: (root / "val").rename(root / "validate"), r"the val split is missing or empty"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_faults_of_the_folder_layout_are_named(tmp_path, pixels, fault):
    write_folders(tmp_path, pixels)
    damage, message = FOLDER_FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        mini.load_split(tmp_path, "train", image_size=SIZE)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


IMAGES = np.zeros((4, SIZE, SIZE, 3), np.uint8)
PICKLE_FAULTS = {
    "keys": ({"images": IMAGES}, r"train\.pkl holds \['images'\]; expected"),
    "list": ([1, 2], r"train\.pkl holds list; expected"),
    "dtype": ({"image_data": IMAGES.astype(float), "class_dict": {"a": [0, 1]}}, "are float64 "),
    "no array": ({"image_data": [1], "class_dict": {"a": [0]}}, r"images are list"),
    "twice": ({"image_data": IMAGES, "class_dict": {"a": [0, 1], "b": [1, 2]}}, "list 4 images, not each"),
    "beyond": ({"image_data": IMAGES, "class_dict": {"a": [0, 1], "b": [2, 4]}}, "not each of the 4 images"),
    "class list": ({"image_data": IMAGES, "class_dict": [0, 1]}, r"train\.pkl: its classes.*'list' object"),
    "rows": ({"image_data": IMAGES, "class_dict": {"a": "all"}}, r"train\.pkl: its classes are not.*'all'"),
    "two names": ({"data": IMAGES, "labels": [0] * 4, "catname2label": {"a": 0, "b": 0}}, "2 .* list 8 "),
    "no name": ({"data": IMAGES, "labels": [0, 0, 1, 1], "catname2label": {"a": 0}}, "1 .* list 2 "),
}


@pytest.mark.parametrize("fault", PICKLE_FAULTS)
def test_faults_of_pickles_are_named(tmp_path, pixels, fault):
    write_cache_pickles(tmp_path, pixels)
    content, message = PICKLE_FAULTS[fault]
    dump(tmp_path / "mini-imagenet-cache-train.pkl", content)
    with pytest.raises(DataError, match=message):
        mini.load_split(tmp_path, "val", image_size=SIZE)


def test_a_malicious_pickle_is_refused_before_it_acts(tmp_path, pixels):
    write_cache_pickles(tmp_path, pixels)
    for protocol in (0, 2, 5):
        content = {"image_data": Malicious(tmp_path / "hit")}
        dump(tmp_path / "mini-imagenet-cache-train.pkl", content, protocol)
        with pytest.raises(DataError, match=r"cache-train\.pkl refers to (posix|nt)\.mkdir"):
            mini.load_split(tmp_path, "train", image_size=SIZE)
    assert not (tmp_path / "hit").exists()


def test_a_damaged_or_missing_pickle_is_named(tmp_path, pixels):
    write_cache_pickles(tmp_path, pixels)
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cache-train\.pkl is not a readable pickle"):
        mini.load_split(tmp_path, "train", image_size=SIZE)
    path.unlink()
    with pytest.raises(DataError, match="the train split is missing or empty"):
        mini.load_split(tmp_path, "val", image_size=SIZE)


def test_two_pickles_for_one_split_are_refused(tmp_path, pixels):
    write_cache_pickles(tmp_path, pixels)
    dump(tmp_path / "mini-imagenet-cache-val.pkl", {})
    with pytest.raises(DataError, match=r"cache-val\.pkl.*both claim the val split"):
        mini.load_split(tmp_path, "train", image_size=SIZE)


def test_missing_data_says_where_and_how(tmp_path):
    (tmp_path / "images").mkdir()
    assert mini.find_data(tmp_path) is None and mini.find_data(tmp_path / "absent") is None
    with pytest.raises(DataError) as caught:
        mini.load_split(tmp_path / "absent", "train")
    text = str(caught.value)
    assert str(tmp_path / "absent") in text and f"--download --data {tmp_path / 'absent'}" in text
    assert all(word in text for word in ("train.csv", "train/CLASS", "mini-imagenet-cache", "category_split"))


def test_several_data_sets_side_by_side_are_refused(tmp_path, pixels):
    write_csv(tmp_path / "one", pixels)
    write_folders(tmp_path / "two", pixels)
    with pytest.raises(DataError, match=r"several data sets \(.*one, .*two\)"):
        mini.find_data(tmp_path)


def test_wrong_requests_are_refused(tmp_path):
    for load in (mini.load_split, mini.synthetic_split):
        with pytest.raises(UsageError, match="split is 'valid'; allowed are train, val, test"):
            load(*((tmp_path, "valid") if load is mini.load_split else ("valid",)))
        with pytest.raises(UsageError, match="image_size is 0"):
            load(*((tmp_path, "val") if load is mini.load_split else ("val",)), image_size=0)


# --- downloads ---

class Server:
    """Serves {path: bytes} on loopback with Range support; `cut` paths lose the connection half-way, once."""

    def __init__(self):
        self.files, self.cut, self.requests = {}, set(), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler):
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        self.requests.append((handler.path, start))
        body = self.files.get(handler.path)
        if body is None:
            return handler.send_error(404)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        if handler.path in self.cut:
            self.cut.remove(handler.path)
            body = body[:len(body) // 2]
        handler.wfile.write(body[start:])

    def publish(self, name):
        """List all /files in the form of Zenodo's record API under `name`."""
        entries = [{"key": path.removeprefix("/files/"), "size": len(body),
                    "checksum": f"md5:{hashlib.md5(body).hexdigest()}"}
                   for path, body in self.files.items() if path.startswith("/files/")]
        self.files[name] = json.dumps({"files": entries}).encode()


@pytest.fixture
def server(tmp_path, pixels, monkeypatch):
    """A server with the tiny set as three pickles (first mirror) and as a zip file (second mirror)."""
    server = Server()
    write_cache_pickles(tmp_path / "pickles", pixels, protocol=4)
    write_csv(tmp_path / "zip" / "mini", pixels)
    shutil.make_archive(tmp_path / "mini", "zip", tmp_path / "zip")
    server.files = {f"/files/{path.name}": path.read_bytes() for path in (tmp_path / "pickles").iterdir()}
    server.publish("/record")
    server.files["/zip/mini.zip"] = (tmp_path / "mini.zip").read_bytes()
    monkeypatch.setattr(mini, "STANDARD", {split: (count, PER_CLASS) for split, count in COUNTS.items()})
    monkeypatch.setattr(mini, "MIRRORS", (
        {"name": "pickles", "record": f"{server.url}/record",
         "urls": [f"{server.url}/files/mini-imagenet-cache-{name}.pkl" for name in PICKLE_NAMES.values()]},
        {"name": "archive", "urls": [f"{server.url}/zip/mini.zip"],
         "sha256": hashlib.sha256(server.files["/zip/mini.zip"]).hexdigest(),
         "size": len(server.files["/zip/mini.zip"])}))
    yield server
    server.http.shutdown()
    server.http.server_close()


TRAIN = "/files/mini-imagenet-cache-train.pkl"


def damaged(body):
    return body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]


def check_downloaded(root, pixels, layout):
    assert mini.find_data(root)[1] == layout
    for split, classes in pixels.items():
        loaded = mini.load_split(root, split, image_size=SIZE)
        np.testing.assert_array_equal(loaded.images, np.stack([classes[name] for name in loaded.names]))


def test_download_takes_the_first_mirror_once(tmp_path, pixels, server, capsys):
    root = tmp_path / "data"
    assert mini.download(root) == mini.find_data(root)
    check_downloaded(root, pixels, "pickles")
    assert "ImageNet's terms of access" in capsys.readouterr().out
    assert not any(path.startswith("/zip") for path, _ in server.requests)
    count = len(server.requests)
    mini.download(root)
    assert "already in" in capsys.readouterr().out and len(server.requests) == count


@pytest.mark.parametrize("fault", ["missing", "corrupt", "short"])
def test_download_turns_to_the_next_mirror(tmp_path, pixels, server, capsys, fault):
    body = server.files.pop(TRAIN)
    server.files |= {"missing": {}, "corrupt": {TRAIN: damaged(body)}, "short": {TRAIN: body[:-9]}}[fault]
    mini.download(tmp_path / "data")
    assert "mirror failed: pickles: " in capsys.readouterr().out
    check_downloaded(tmp_path / "data", pixels, "csv")


@pytest.mark.parametrize("record", [None, b"<html>", b"{}", b'{"files": [1]}'])
def test_download_without_published_checksums_verifies_the_content(tmp_path, pixels, server, capsys, record):
    server.files.pop("/record")
    if record is not None:
        server.files["/record"] = record
    good = server.files[TRAIN]
    server.files[TRAIN] = good[:-9]         # cut off by whoever uploaded it
    mini.download(tmp_path / "data")
    out = capsys.readouterr().out
    assert "no checksums from" in out and "train.pkl is not a readable pickle" in out
    check_downloaded(tmp_path / "data", pixels, "csv")
    server.files[TRAIN] = good
    mini.download(tmp_path / "again")
    check_downloaded(tmp_path / "again", pixels, "pickles")


def test_download_refuses_another_data_set(tmp_path, pixels, server, monkeypatch, capsys):
    monkeypatch.setitem(mini.STANDARD, "val", (2, 600))
    with pytest.raises(DownloadError, match="val split is 2 classes x 4 images, not 2 x 600"):
        mini.download(tmp_path / "data")
    assert mini.find_data(tmp_path / "data") is None


def test_a_cut_download_resumes(tmp_path, pixels, server, monkeypatch, capsys):
    server.cut.add(TRAIN)
    monkeypatch.setattr(mini, "MIRRORS", mini.MIRRORS[:1])
    try:
        mini.download(tmp_path / "data")
    except DownloadError:
        mini.download(tmp_path / "data")
    half = len(server.files[TRAIN]) // 2
    assert [start for path, start in server.requests if path == TRAIN] == [0, half]
    check_downloaded(tmp_path / "data", pixels, "pickles")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, UsageError("the disk is full")])
def test_an_unpacking_that_was_interrupted_starts_again_without_a_new_download(tmp_path, pixels, server, monkeypatch, capsys, fault):
    monkeypatch.setattr(mini, "MIRRORS", mini.MIRRORS[1:])
    check = mini._check_standard

    def interrupted(home):
        raise fault
    monkeypatch.setattr(mini, "_check_standard", interrupted)
    with pytest.raises(type(fault) if isinstance(fault, Exception) else fault):
        mini.download(tmp_path / "data")
    monkeypatch.setattr(mini, "_check_standard", check)
    mini.download(tmp_path / "data")
    check_downloaded(tmp_path / "data", pixels, "csv")
    assert [path for path, _ in server.requests] == ["/zip/mini.zip"]
    assert not list((tmp_path / "data/.download").iterdir())


def test_when_all_mirrors_fail_the_manual_way_is_told(tmp_path, server, capsys):
    server.files.clear()
    with pytest.raises(DownloadError) as caught:
        mini.download(tmp_path / "data")
    text = str(caught.value)
    assert f"{server.url}/files/mini-imagenet-cache-train.pkl" in text and str(tmp_path / "data") in text
    assert "pickles: " in text and "archive: " in text and text.count("By hand") == 1


# --- synthetic classes ---

@pytest.fixture(scope="module")
def synthetic():
    return mini.synthetic_split("test")


def test_synthetic_is_deterministic_and_says_so(synthetic):
    assert synthetic.synthetic and synthetic.dataset.startswith("SYNTHETIC")
    assert synthetic.images.shape == (20, mini.SYNTHETIC_PER_CLASS, 84, 84, 3)
    assert not synthetic.images.flags.writeable
    small = mini.synthetic_split("val", seed=3, image_size=16)
    np.testing.assert_array_equal(small.images, mini.synthetic_split("val", seed=3, image_size=16).images)
    assert (small.images != mini.synthetic_split("val", seed=4, image_size=16).images).mean() > 0.9
    other = mini.synthetic_split("test", seed=3, image_size=16).images[:16]
    assert (small.images != other).mean() > 0.9      # the splits hold different classes


def nearest_centroid_accuracy(features, shots, tasks=200):
    """Accuracy (%) of 5-way nearest-centroid classification of (C, P, D) features."""
    data = torch.arange(features.shape[0] * features.shape[1]).view(*features.shape[:2], 1, 1, 1)
    rows = mini.sample_episodes(data, tasks, 5, shots, 15, torch.Generator().manual_seed(0))
    flat = torch.as_tensor(features, dtype=torch.float32).flatten(0, 1)
    support, query = flat[rows[0].flatten(1)], flat[rows[2].flatten(1)]                     # (T, N, D)
    centroids = support.view(tasks, shots, 5, -1).mean(1)                                   # (T, 5, D)
    return 100 * (torch.cdist(query, centroids).argmin(-1) == rows[3]).double().mean().item()


def test_synthetic_is_neither_trivial_nor_hopeless(synthetic):
    # Chance is 20 %, one sigma of these 200 tasks about 0.6 %. Measured at 1 / 5 shots: pixels 29.7 / 40.7 %,
    # colours 25.1 / 31.5 % (other seeds: up to 2.9 away); the limits leave 3 points beyond all seeds seen.
    pixels = synthetic.images[:, :, ::4, ::4].reshape(20, mini.SYNTHETIC_PER_CLASS, -1) / 255
    bins = (synthetic.images // 64).astype(int) @ [16, 4, 1]                                # (C, P, S, S)
    colours = np.stack([np.stack([np.bincount(image.ravel(), minlength=64) for image in images])
                        for images in bins]) ** 0.5
    for shots, low, high, ceiling in ((1, 24, 34, 30), (5, 34, 47, 38)):
        assert low < nearest_centroid_accuracy(pixels, shots) < high
        assert nearest_centroid_accuracy(colours, shots) < ceiling


# --- episodes ---

def labelled(classes=9, per_class=12):
    """A data tensor (C, P, 1, 1, 3) whose red channel is the class and green channel the image."""
    data = torch.zeros(classes, per_class, 1, 1, 3, dtype=torch.uint8)
    data[..., 0] = torch.arange(classes).view(-1, 1, 1, 1)
    data[..., 1] = torch.arange(per_class).view(1, -1, 1, 1)
    return data


def draw(seed=0, tasks=40, ways=5, shots=3, queries=4, data=None):
    return mini.sample_episodes(labelled() if data is None else data, tasks, ways, shots, queries,
                                torch.Generator().manual_seed(seed))


def test_episode_shapes_and_label_order():
    support_x, support_y, query_x, query_y = draw()
    assert support_x.shape == (40, 15, 3, 1, 1) and query_x.shape == (40, 20, 3, 1, 1)
    assert support_x.dtype == torch.uint8 and query_y.dtype == torch.int64
    assert (support_y == torch.arange(5).repeat(3)).all() and (query_y == torch.arange(5).repeat(4)).all()
    for x, y in ((support_x, support_y), (query_x, query_y)):       # one label is one class within a task
        assert (x[:, :, 0, 0, 0] == x[:, :5, 0, 0, 0].gather(1, y)).all()
    assert (support_x[:, :5, 0] == query_x[:, :5, 0]).all()         # and the same one in support and query


def test_classes_and_images_of_a_task_are_distinct():
    support_x, _, query_x, _ = draw()
    for task in range(40):
        assert len(support_x[task, :5, 0].unique()) == 5
        both = torch.cat([support_x[task], query_x[task]])[:, :2, 0, 0]
        assert len(both.unique(dim=0)) == 35


def test_channels_rows_and_columns_keep_their_places():
    data = torch.arange(5 * 2 * 4 * 4 * 3).remainder(251).to(torch.uint8).view(5, 2, 4, 4, 3)
    support_x, _, query_x, _ = draw(tasks=1, shots=1, queries=1, data=data)
    images = torch.cat([support_x[0], query_x[0]])
    drawn = {tuple(image.permute(1, 2, 0).flatten().tolist()) for image in images}
    assert drawn == {tuple(image.flatten().tolist()) for image in data.flatten(0, 1)}


def test_the_generator_decides():
    for first, again, other in zip(draw(seed=1), draw(seed=1), draw(seed=2)):
        assert torch.equal(first, again)
        assert first.dtype == torch.int64 or not torch.equal(first, other)


def test_draws_are_uniform():
    support_x, _, query_x, _ = draw(tasks=4000)
    classes = support_x[:, :5, 0, 0, 0].long()
    first = torch.bincount(classes[:, 0], minlength=9)              # of label 0
    every = torch.bincount(classes.flatten(), minlength=9)
    images = torch.bincount(query_x[:, :, 1].flatten().long(), minlength=12)
    for counts, total, chance in ((first, 4000, 1 / 9), (every, 4000, 5 / 9), (images, 20000, 4 / 12)):
        sigma = (total * chance * (1 - chance)) ** 0.5        # binomial; smaller without replacement
        assert (counts - total * chance).abs().max() < 5 * sigma, counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_sees_the_same_episodes():
    for here, there in zip(draw(), draw(data=labelled().cuda())):
        assert there.is_cuda and torch.equal(here, there.cpu())


def test_impossible_episodes_are_refused():
    for sizes, message in (({"ways": 10}, "ways is 10, but the split has only 9 classes"),
                           ({"shots": 9}, r"9 \+ 4 = 13, but a class has only 12 images"),
                           ({"queries": 0}, "queries=0: all must be above 0")):
        with pytest.raises(UsageError, match=message):
            draw(**sizes)


def test_the_tensor_shares_the_memory_map_without_a_warning(tmp_path, pixels, recwarn):
    write_folders(tmp_path, pixels)
    images = mini.load_split(tmp_path, "test", image_size=SIZE)
    tensor = mini.to_tensor(images)
    assert tensor.data_ptr() == images.images.ctypes.data
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalise(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3).movedim(-1, 1)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    expected, out = (x.double() / 255 - mean) / std, mini.normalise(x, dtype)
    assert out.dtype == dtype and out.is_contiguous() and x.dtype == torch.uint8
    # x scale and mean / std stay below 4.5: two roundings in each of both, one of the difference and one in
    # the reference, of at most 4.5 eps / 2 each
    assert (out.double() - expected).abs().max() < 6 * 4.5 / 2 * torch.finfo(dtype).eps


# --- augmentation ----------------------------------------------------------------------------------------------------

WHOLE = dict(area=1.0, aspect=0.5, left=0.5, top=0.5, flip=0.9, brightness=0.5, contrast=0.5, colour=0.5)   # changes nothing


def augmented(x, size, **draws):
    """mini.augment of images (N, 3, S, S), all with the draws of WHOLE but for those given."""
    row = torch.tensor(list((WHOLE | draws).values()))
    return mini.augment(x[None], row.expand(1, len(x), 8), size)[0]


@pytest.fixture
def photos():
    return torch.randint(256, (4, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_draws_that_change_nothing(photos):
    torch.testing.assert_close(augmented(photos, 24), photos.float(), rtol=0, atol=1e-3)


def test_a_flip_mirrors(photos):
    torch.testing.assert_close(augmented(photos, 24, flip=0.4), photos.float().flip(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("left, top, rows, columns", [(0.0, 1.0, slice(12, 24), slice(0, 12)),
                                                      (1.0, 0.0, slice(0, 12), slice(12, 24))])
def test_a_crop_is_that_part_of_the_image(photos, left, top, rows, columns):
    """A quarter of the area at the size of its pixels, in a corner."""
    quarter = (0.25 - 0.08) / 0.92
    out = augmented(photos, 12, area=quarter, left=left, top=top)
    torch.testing.assert_close(out, photos[:, :, rows, columns].float(), rtol=0, atol=1e-2)


def test_a_crop_may_be_wider_than_high_and_stays_inside(photos):
    """Of the smallest area, 4:3: as torch's own resizing of 7.8 x 5.9 pixels; without the border, where both look beyond it."""
    ramp = torch.arange(24.0).expand(1, 3, 24, 24)
    area = 0.08 * 24 * 24
    for picture, extent in ((ramp, (area * 4 / 3) ** 0.5), (ramp.mT, (area * 3 / 4) ** 0.5)):       # along columns, rows
        out = augmented(picture, 24, area=0.0, aspect=1.0, left=0.0, top=0.0)
        out = out if picture is ramp else out.mT
        expected = ((torch.arange(24) + 0.5) * extent / 24 - 0.5).clamp(min=0)
        torch.testing.assert_close(out, expected.expand(1, 3, 24, 24), rtol=0, atol=1e-3)


def test_colours_change_as_said(photos):
    x = photos.float()
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    for name, plain in (("brightness", torch.zeros(1)), ("contrast", grey.mean((2, 3), keepdim=True)), ("colour", grey)):
        for draw, factor in ((0.0, 0.6), (1.0, 1.4)):
            expected = (plain + factor * (x - plain)).clamp(0, 255)
            torch.testing.assert_close(augmented(photos, 24, **{name: draw}), expected, rtol=0, atol=2e-3)


def test_every_image_has_its_own_draws(photos):
    draws = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(1))
    together = mini.augment(photos.unflatten(0, (2, 2)), draws, 16)
    assert together.shape == (2, 2, 3, 16, 16) and 0 <= together.min() and together.max() <= 255
    for k, out in enumerate(together.flatten(0, 1)):
        alone = mini.augment(photos[None, k:k + 1], draws.view(1, 4, 8)[:, k:k + 1], 16)[0, 0]
        torch.testing.assert_close(out, alone, rtol=0, atol=1e-3)


def test_the_centre_of_larger_images_is_what_the_network_reads(photos):
    args = mini.parse_flags(["--augment", "--image-size", "21"])
    assert mini.stored_size(args) == 24
    seen = mini.to_input(photos, args)
    torch.testing.assert_close(seen, mini.normalise(photos[:, :, 1:22, 1:22]))
    assert [mini.stored_size(mini.parse_flags(["--backbone", name])) for name in mini.BACKBONES] == [84, 257, 92]


def test_images_of_a_batch_come_with_their_classes():
    data = labelled()
    x, y = mini.sample_images(data, 2000, torch.Generator().manual_seed(0))
    assert x.shape == (1, 2000, 3, 1, 1) and torch.equal(x[0, :, 0, 0, 0].long(), y[0])
    seen = torch.bincount(y[0] * 12 + x[0, :, 1, 0, 0], minlength=108)
    assert (seen - 2000 / 108).abs().max() < 5 * (2000 / 108) ** 0.5



# --- the real data ---

@pytest.mark.parametrize("split", mini.SPLITS)
def test_the_real_data(split):
    root = os.environ.get("MODGRAD_DATA")
    if not root or mini.find_data(Path(root) / "mini-imagenet") is None:
        pytest.skip(f"no mini-imagenet/ in the folder that MODGRAD_DATA names ({root})")
    loaded = mini.load_split(Path(root) / "mini-imagenet", split)
    assert loaded.images.shape == (*mini.STANDARD[split], 84, 84, 3)
    assert "not the standard" not in loaded.dataset
    home, layout = mini.find_data(Path(root) / "mini-imagenet")
    index = mini._read_index(home, layout)[split]
    for row in (0, len(loaded.names) // 2, -1):
        source = index[loaded.names[row]]
        assert (loaded.images[row, 599] == mini._pixels(source[599], 84, Image.BICUBIC)).all()
    # photographs, not blanks or noise: natural images vary, and neighbouring pixels agree
    sample = loaded.images[:, ::100].astype(np.float32)
    assert sample.std((2, 3, 4)).min() > 1 and np.abs(np.diff(sample, axis=3)).mean() < 0.5 * sample.std()
