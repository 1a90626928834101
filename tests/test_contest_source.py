"""Published data from a hub: a local HTTP server plays it, with all that networks and strangers do."""

import contextlib
import email.message
import hashlib
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt
from data import prepare
from tests.test_prepare import TEXTS, models, read_back, write_lines  # noqa: F401, a fixture among them

CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
HUB_ROOT = "datasets/{repo}/resolve/main/datasets"


class Handler(BaseHTTPRequestHandler):
    """Serves server.root with ranges. server.faults maps the end of a path to functions that answer instead, once
    each."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        for end, faults in self.server.faults.items():
            if self.path.endswith(end) and faults:
                return faults.pop(0)(self)
        self.serve()

    def serve(self, limit=None, ranges=True, promised=0):
        """Answer with the file: cut after `limit` bytes, or announced to be longer by `promised`."""
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        begin = 0
        if wanted and ranges:
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if begin >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content) + promised}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - begin + promised))
        self.end_headers()
        self.wfile.write(content[begin:][:limit])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare, "FIRST_PAUSE_S", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = tmp_path / "hub"
    server.requests = []
    server.faults = {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def published(models, tmp_path_factory):  # noqa: F811
    """Folders as the contest publishes them: plain, lossy, without side-car; and CaseOps with one. Training documents
    straddle shards."""
    root = tmp_path_factory.mktemp("published")
    for kind, dataset, repo in (
        ("lossy", "fineweb10B_sp400", prepare.PLAIN_REPOSITORY),
        ("caseops", CASEOPS, prepare.REPOSITORIES["caseops"]),
    ):
        folder = root / HUB_ROOT.format(repo=repo)
        shards = folder / "datasets" / dataset
        for path in (shards, folder / "tokenizers"):
            path.mkdir(parents=True)
        (folder / "tokenizers" / f"{kind}.model").write_bytes(models[kind])
        encoder = prepare.load_encoder(models[kind], kind == "caseops")
        val = [prepare.encode_document(encoder, text, True)[:2] for text in TEXTS[:50]]
        for i, documents in enumerate((val[:30], val[30:])):
            tokens, sidecar = zip(*documents, strict=True)
            prepare.write_shard(shards / f"fineweb_val_{i:06d}.bin", list(tokens))
            if kind == "caseops":
                prepare.write_shard(shards / f"fineweb_val_bytes_{i:06d}.bin", list(sidecar))
        train = np.concatenate([prepare.encode_document(encoder, text, False)[0] for text in TEXTS[50:300]])
        for i, tokens in enumerate(np.array_split(train, 3)):
            prepare.write_shard(shards / f"fineweb_train_{i:06d}.bin", [tokens])
        stats = {"files_train": 3, "files_val": 2}
        (folder / "manifest.json").write_text(
            json.dumps(
                {
                    "datasets": [
                        {"name": "fineweb10B_byte260", "tokenizer_name": "b", "stats": stats},
                        {"name": dataset, "tokenizer_name": kind, "stats": stats},
                    ],
                    "tokenizers": [
                        {"name": kind, "model_path": f"tokenizers/{kind}.model"},
                        {"name": "b", "path": "b.json"},
                    ],
                }
            )
        )
    return root


@pytest.fixture
def contest(hub, published, tmp_path):
    """Runs `prepare contest` against a hub that has the published folders."""
    shutil.copytree(published, hub.root)

    def run(*arguments):
        hub.requests.clear()
        return prepare.main(
            ["contest", "--base-url", hub.url, "--out", str(tmp_path / "out"), "--workers", "1", *map(str, arguments)]
        )

    run.hub = hub
    run.datasets = tmp_path / "out" / "datasets"
    run.remote = hub.root / HUB_ROOT.format(repo=prepare.REPOSITORIES["caseops"]) / "datasets" / CASEOPS
    return run


def empty_repository(hub) -> Path:
    """The folder of the repository some/one."""
    folder = hub.root / HUB_ROOT.format(repo="some/one")
    folder.mkdir(parents=True)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def asked(hub, name: str) -> list[str | None]:
    """The Range header of every request for a file."""
    return [wanted for path, wanted in hub.requests if path.endswith(name)]


# ---- what is published ------------------------------------------------------


def test_caseops_shards_arrive_with_their_sidecar(contest):
    assert contest("--train-shards", 3) == 0
    folder = contest.datasets / CASEOPS
    assert names(contest.datasets) == [CASEOPS]
    assert names(folder) == sorted([*(p.name for p in contest.remote.iterdir()), "manifest.json"])
    for path in contest.remote.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    size = sum(len(t.encode()) for t in TEXTS[:50])
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert [val[name] for name in ("documents", *prepare.BYTE_COUNTS)] == [50, size, size, size, None]
    assert train["documents"] == 250 and train["tokens"] == sum(s["tokens"] for s in train["shards"])
    tokenizer = train_gpt.load_tokenizer(train_gpt.read_env({"DATA_PATH": str(folder)})[1], 420)
    assert train_gpt.load_validation(str(folder), 420, tokenizer).bytes.sum() == size


def test_plain_shards_are_weighed_by_the_formula(contest, models):  # noqa: F811
    assert contest("--variant", "sp400", "--train-shards", 1) == 0
    folder = contest.datasets / "fineweb10B_sp400"
    assert names(folder) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "fineweb_val_000001.bin",
        "manifest.json",
    ]
    facts = json.loads((folder / "manifest.json").read_text())["splits"]["val"]
    encoder = prepare.load_encoder(models["lossy"], False)
    byte_counts = np.array([prepare.encode_document(encoder, t, False)[2] for t in TEXTS[:50]]).sum(0).tolist()
    assert [facts["decoded_bytes"], facts["contest_bytes"]] == [byte_counts[1], byte_counts[3]]
    assert facts["original_bytes"] is None and facts["smaller_bytes"] is None and facts["excess_bytes"] == 0


def test_spaces_inside_pieces_are_recorded_and_warned_of(contest, models, capsys):  # noqa: F811
    """The formula takes each for three bytes, and there is no side-car that knows better."""
    folder = contest.hub.root / HUB_ROOT.format(repo=prepare.PLAIN_REPOSITORY)
    (folder / "tokenizers" / "lossy.model").write_bytes(models["suffix"])
    encoder = prepare.load_encoder(models["suffix"], False)
    shards = {"val_000000": TEXTS[:30], "val_000001": TEXTS[30:50], "train_000000": TEXTS[50:90]}
    for name, texts in shards.items():
        tokens = [prepare.encode_document(encoder, text, False)[0] for text in texts]
        prepare.write_shard(folder / "datasets" / "fineweb10B_sp400" / f"fineweb_{name}.bin", tokens)

    size = sum(len(text.encode()) for text in TEXTS[:50])
    for _ in range(2):  # the second time, it is prepared already
        assert contest("--variant", "sp400", "--train-shards", 1) == 0
        manifest = json.loads((contest.datasets / "fineweb10B_sp400" / "manifest.json").read_text())
        facts = manifest["splits"]["val"]
        assert facts["contest_bytes"] - facts["excess_bytes"] == facts["decoded_bytes"] == size < facts["contest_bytes"]
        assert f"formula counts {facts['excess_bytes']:,} bytes too many" in capsys.readouterr().out


def test_a_longer_download_goes_on_from_a_shorter_one(contest, capsys):
    assert contest("--train-shards", 1) == 0
    assert contest("--train-shards", 1) == 0
    assert "already prepared" in capsys.readouterr().out and not contest.hub.requests
    assert contest("--train-shards", 3) == 0
    fetched = [path.rsplit("/")[-1] for path, _ in contest.hub.requests]
    assert fetched == ["manifest.json", "caseops.model", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert len(list((contest.datasets / CASEOPS).glob("*_train_*"))) == 3


def files_and_manifest_agree(folder: Path) -> bool:
    splits = json.loads((folder / "manifest.json").read_text())["splits"].values()
    listed = [file["file"] for split in splits for file in split["shards"] + split["sidecars"]]
    return names(folder) == sorted([*listed, "manifest.json"])


def test_a_shorter_download_leaves_no_surplus(contest, capsys):
    """Training reads every shard of the folder."""
    folder = contest.datasets / CASEOPS
    assert contest("--train-shards", 3) == 0
    before = names(folder)
    contest.hub.faults["manifest.json"] = [lambda h: h.send_error(404)]
    assert contest("--train-shards", 1) == 2 and names(folder) == before and files_and_manifest_agree(folder)
    contest.hub.faults["caseops.model"] = [lambda h: h.send_error(404)]
    assert contest("--train-shards", 1) == 2 and names(folder) == before and files_and_manifest_agree(folder)

    assert contest("--train-shards", 1) == 0
    assert "2 of its files are not asked for" in capsys.readouterr().err
    assert files_and_manifest_agree(folder) and len(list(folder.glob("*_train_*"))) == 1
    assert not asked(contest.hub, ".bin") and names(contest.datasets) == [CASEOPS]


def test_an_interrupted_longer_download_leaves_no_surplus(contest):
    contest.hub.faults["fineweb_train_000002.bin"] = [lambda h: h.serve(limit=1500)] + [busy(503)] * 6
    assert contest("--train-shards", 3) == 2
    assert contest("--train-shards", 1) == 0 and not asked(contest.hub, ".bin")
    assert files_and_manifest_agree(contest.datasets / CASEOPS)


def test_validation_that_became_shorter_leaves_no_surplus(contest):
    """A shard of the earlier validation would be scored."""
    folder = contest.datasets / CASEOPS
    assert contest("--train-shards", 1) == 0
    manifest = contest.remote.parent.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files_val": 2', '"files_val": 1'))
    assert contest("--train-shards", 2) == 0
    assert files_and_manifest_agree(folder) and len(list(folder.glob("*_val_0*"))) == 1


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-2]), lambda p: change_tokens(7, 419)(p)])
def test_a_damaged_shard_of_an_earlier_download_is_fetched_again(contest, damage):
    assert contest("--train-shards", 2) == 0
    name = "fineweb_train_000001.bin"
    damage(contest.datasets / CASEOPS / name)
    assert contest("--train-shards", 3) == 0
    assert [path.rsplit("/")[-1] for path, _ in contest.hub.requests][2:] == [name, "fineweb_train_000002.bin"]
    assert (contest.datasets / CASEOPS / name).read_bytes() == (contest.remote / name).read_bytes()


def test_a_full_disk_is_noticed_before_the_download(contest, monkeypatch, capsys):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert contest("--train-shards", 1) == 2
    assert "no space for " in capsys.readouterr().err and not asked(contest.hub, ".bin")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train-shards", 4], "--train-shards 4: romeerp/parameter-golf-caseops-v1 has 3 of fineweb10B_sp8192"),
        (["--variant", "sp1024"], "no fineweb10B_sp1024; it has fineweb10B_byte260, fineweb10B_sp400; choose another"),
        (["--variant", "byte260"], "does not describe fineweb10B_byte260 and its SentencePiece model"),
        (["--repo", "some/one"], "HTTP 404 Not Found; see --variant, --repo and --base-url"),
        (["--caseops"], "--tokenizer and --caseops go with --documents"),
    ],
)
def test_what_is_not_published_is_refused(contest, capsys, arguments, message):
    assert contest("--train-shards", 1, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not contest.datasets.exists() or not [p for p in contest.datasets.iterdir() if p.name[0] != "."]


def test_markers_in_plain_shards_are_refused_before_the_download(contest, models, capsys):  # noqa: F811
    folder = contest.hub.root / HUB_ROOT.format(repo=prepare.PLAIN_REPOSITORY)
    (folder / "tokenizers" / "lossy.model").write_bytes(models["caseops"])
    assert contest("--variant", "sp400", "--train-shards", 1) == 2
    assert "its pieces hold the markers of CaseOps" in capsys.readouterr().err
    assert not asked(contest.hub, ".bin")


def test_a_manifest_that_is_none_is_refused(contest, capsys):
    path = contest.remote.parent.parent / "manifest.json"
    for content in (
        "<html>",
        "[]",
        '{"datasets": 1}',
        '{"datasets": [{}], "tokenizers": []}',
        path.read_text().replace('"files_val": 2', '"files_val": 0'),
    ):
        path.write_text(content)
        assert contest("--train-shards", 1) == 2
        assert "does not describe" in capsys.readouterr().err


# ---- bad shards -------------------------------------------------------------


def change_tokens(position: int, value: int):
    def change(path: Path) -> None:
        tokens = train_gpt.read_shard(path).copy()
        tokens[position] = value
        prepare.write_shard(path, [tokens])

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("fineweb_train_000001.bin", change_tokens(7, 420), "its largest token is 420, the vocabulary has 420"),
        ("fineweb_train_000000.bin", lambda p: prepare.write_shard(p, [np.full(9, 300, np.uint16)]), "no BOS (1)"),
        ("fineweb_train_000000.bin", lambda p: prepare.write_shard(p, []), "its largest token is 0"),
        ("fineweb_val_bytes_000001.bin", lambda p: prepare.write_shard(p, [np.zeros(9, np.uint16)]), "9 entries for "),
        ("fineweb_val_000001.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), "truncated or damaged"),
        ("fineweb_train_000002.bin", lambda p: p.write_bytes(b"<html>" * 500), "not a shard"),
    ],
)
def test_a_bad_shard_is_refused_and_fetched_again(contest, capsys, name, change, message):
    good = (contest.remote / name).read_bytes()
    change(contest.remote / name)
    assert contest("--train-shards", 3) == 2
    error = capsys.readouterr().err
    assert f"{name}: " in error and message in error
    assert not (contest.datasets / CASEOPS).exists()
    (contest.remote / name).write_bytes(good)
    assert contest("--train-shards", 3) == 0
    assert [path.rsplit("/")[-1] for path, _ in contest.hub.requests] == ["manifest.json", "caseops.model", name]


def cut_validation(remote: Path, *cuts: int) -> None:
    """Publish validation anew, cut at these tokens."""
    for kind in ("val", "val_bytes"):
        paths = [remote / f"fineweb_{kind}_{i:06d}.bin" for i in (0, 1)]
        stream = np.concatenate([train_gpt.read_shard(path) for path in paths])
        for i, part in enumerate(np.split(stream, cuts)):
            prepare.write_shard(remote / f"fineweb_{kind}_{i:06d}.bin", [part])
    manifest = remote.parent.parent / "manifest.json"
    stats = f'"files_val": {len(cuts) + 1}'
    manifest.write_text(manifest.read_text().replace('"files_val": 2', stats))


def test_validation_shards_may_be_cut_inside_documents(contest):
    """As the contest's own script cuts them; one may be empty, another hold no beginning of a document."""
    assert contest("--train-shards", 1) == 0
    folder = contest.datasets / CASEOPS
    expected = json.loads((folder / "manifest.json").read_text())["splits"]["val"]
    shutil.rmtree(folder)

    second = len(train_gpt.read_shard(contest.remote / "fineweb_val_000000.bin")) + 1
    cut_validation(contest.remote, second, second + 3, second + 3)
    assert contest("--train-shards", 1) == 0
    found = json.loads((folder / "manifest.json").read_text())["splits"]["val"]
    assert len(found["shards"]) == len(found["sidecars"]) == 4 and found["shards"][2]["tokens"] == 0
    assert {k: v for k, v in found.items() if k not in ("shards", "sidecars")} == {
        k: v for k, v in expected.items() if k not in ("shards", "sidecars")
    }
    tokenizer = train_gpt.load_tokenizer(train_gpt.read_env({"DATA_PATH": str(folder)})[1], 420)
    size = sum(len(t.encode()) for t in TEXTS[:50])
    assert train_gpt.load_validation(str(folder), 420, tokenizer).bytes.sum() == size


def test_validation_that_begins_inside_a_document_is_refused_and_kept(contest, capsys):
    name = "fineweb_val_000000.bin"
    change_tokens(0, 300)(contest.remote / name)
    assert contest("--train-shards", 1) == 2
    error = capsys.readouterr().err
    assert f"{name}: no BOS (1) where validation must begin" in error
    (kept,) = contest.datasets.glob(f".*/{name}")
    assert kept.read_bytes() == (contest.remote / name).read_bytes()


def test_validation_without_any_token_is_refused(contest, capsys):
    for kind in ("val", "val_bytes"):
        for i in (0, 1):
            prepare.write_shard(contest.remote / f"fineweb_{kind}_{i:06d}.bin", [])
    assert contest("--train-shards", 1) == 2
    assert "its validation shards are empty" in capsys.readouterr().err


def test_another_source_does_not_replace_a_download(contest, capsys):
    assert contest("--train-shards", 1) == 0
    shutil.copytree(
        contest.remote.parent.parent, contest.hub.root / HUB_ROOT.format(repo="some/one"), dirs_exist_ok=True
    )
    assert contest("--train-shards", 1, "--repo", "some/one") == 2
    assert "holds another dataset (other source); choose another --name, or say --replace" in capsys.readouterr().err
    assert contest("--train-shards", 1, "--repo", "some/one", "--replace") == 0


def test_validation_in_training_is_refused(contest, capsys):
    shutil.copy(contest.remote / "fineweb_val_000000.bin", contest.remote / "fineweb_train_000002.bin")
    assert contest("--train-shards", 2) == 0
    assert contest("--train-shards", 3) == 2
    assert "validation documents are in training too" in capsys.readouterr().err


# ---- hostile hubs -----------------------------------------------------------


@pytest.mark.parametrize(
    "old, new",
    [
        ('"files_val": 2', '"files_val": 1000000000'),
        ('"files_train": 3', '"files_train": 1000000000'),
        ('"files_val": 2', '"files_val": Infinity'),
        ('"files_val": 2', '"files_val": 1e999'),
        ('"files_val": 2', '"files_val": NaN'),
        ('"files_val": 2', '"files_val": true'),
        ('"files_val": 2', '"files_val": ' + "9" * 5000),
        ('"tokenizers/caseops.model"', '{"a": 1}'),
        ('{"datasets"', '{"deep": ' + "[" * 100_000 + "]" * 100_000 + ', "datasets"'),
        ('{"datasets"', '{"datasets": [{"name": []}], "datasets2"'),
    ],
)
def test_a_manifest_is_not_believed(contest, capsys, old, new):
    path = contest.remote.parent.parent / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert contest("--train-shards", 1) == 2
    error = capsys.readouterr().err
    assert "does not describe" in error and error.count("\n") == 1 and len(error) < 1000
    assert not asked(contest.hub, ".bin")


def test_names_of_a_manifest_do_not_reach_the_terminal(contest, capsys):
    path = contest.remote.parent.parent / "manifest.json"
    path.write_text(json.dumps({"datasets": [{"name": "\x1b[2Jx"}, {"name": 7}], "tokenizers": []}))
    assert contest("--train-shards", 1) == 2
    error = capsys.readouterr().err
    assert "it has \\x1b[2Jx, 7; choose another" in error and "\x1b" not in error


@pytest.mark.parametrize("old", ["[" * 100_000, '{"parameters": Infinity}'])
def test_a_local_manifest_is_not_believed(contest, capsys, old):
    assert contest("--train-shards", 1) == 0
    (contest.datasets / CASEOPS / "manifest.json").write_text(old)
    assert contest("--train-shards", 1) == 2
    error = capsys.readouterr().err
    assert "holds something unreadable; choose another --name, or say --replace" in error
    assert contest("--train-shards", 1, "--replace") == 0


def test_our_own_errors_are_not_errors_of_the_manifest(contest, documents, monkeypatch, capsys):
    for name in ("manifest.json", "docs_selected.source_manifest.json"):
        arguments = ["--documents"] if name.startswith("docs") else []
        contest.hub.faults[name] = [lambda h: h.send_error(404)]
        assert contest("--train-shards", 1, *arguments) == 2
        error = capsys.readouterr().err
        assert "HTTP 404 Not Found; see --variant" in error
        assert "does not describe" not in error and "names no docs" not in error

        with monkeypatch.context() as patch:
            patch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=-1))
            assert contest("--train-shards", 1, *arguments) == 2
        error = capsys.readouterr().err
        assert f"no space for {name}" in error and "does not describe" not in error and "names no docs" not in error


def test_a_digest_that_is_none_is_refused_before_the_download(contest, documents, capsys):
    for digest in ("", 7, None, "g" * 64):
        (documents / "docs_selected.source_manifest.json").write_text(json.dumps({"docs_sha256": digest}))
        assert contest("--documents") == 2
        assert "names no docs_sha256" in capsys.readouterr().err and not asked(contest.hub, "docs_selected.jsonl")


def endless(*headers: tuple[str, str], chunked: bool = False):
    """An answer that goes on until the client hangs up."""

    def answer(handler):
        handler.send_response(200)
        for header in headers:
            handler.send_header(*header)
        handler.end_headers()
        block = bytes(1 << 16)
        handler.close_connection = True
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"10000\r\n" + block + b"\r\n" if chunked else block)

    return answer


def test_a_file_without_an_end_is_given_up(hub, tmp_path, monkeypatch):
    remote = prepare.Hub(hub.url, "some/one")
    hub.faults["x"] = [endless()]
    with pytest.raises(train_gpt.DataError, match="does not end after 3,000,000 bytes"):
        remote.fetch("x", tmp_path / "x", most=3_000_000)
    hub.faults["x"] = [endless(("Content-Length", "3000001"))]
    with pytest.raises(train_gpt.DataError, match="3,000,001 bytes, expected at most 3,000,000"):
        remote.fetch("x", tmp_path / "x", most=3_000_000)
    hub.faults["x"] = [endless()]
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 27))
    with pytest.raises(train_gpt.UserError, match="no space for x, whose size is unknown"):
        remote.fetch("x", tmp_path / "x")
    assert (tmp_path / ".x.part").stat().st_size == 0 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "headers, message",
    [
        ([("Content-Length", "abc")], "Content-Length is 'abc'"),
        ([("Content-Length", "-5")], "Content-Length is '-5'"),
        ([("Transfer-Encoding", "chunked"), ("Content-Length", "70000")], "more than the promised 70,000 bytes"),
    ],
)
def test_a_wrong_length_is_given_up(hub, tmp_path, headers, message):
    hub.faults["x"] = [endless(*headers, chunked=len(headers) > 1)] * 9
    with pytest.raises(train_gpt.UserError, match=message):
        prepare.Hub(hub.url, "some/one").fetch("x", tmp_path / "x")
    assert (tmp_path / ".x.part").stat().st_size == 0


def redirect_to(place: str):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.mark.parametrize("place", ["ftp://127.0.0.1:1/x", "file:///etc/hostname", "data:text/plain,x"])
def test_redirects_stay_on_the_web(hub, tmp_path, place):
    hub.faults["x"] = [redirect_to(place)]
    with pytest.raises(train_gpt.UserError, match="HTTP 302 ") as error:
        prepare.Hub(hub.url, "some/one").fetch("x", tmp_path / "x")
    assert place in str(error.value) and len(hub.requests) == 1


@pytest.mark.parametrize("place", ["http://[::1", "http://x:y/", "http://127.0.0.1:1/\xe9"])
def test_a_redirect_to_no_address_is_given_up(hub, tmp_path, place):
    hub.faults["x"] = [redirect_to(place)] * 9
    with pytest.raises(train_gpt.UserError, match="gave up after 6 attempts"):
        prepare.Hub(hub.url, "some/one").fetch("x", tmp_path / "x")


@pytest.mark.parametrize("name", ["\ud800", "a b?c#d", "\xe9"])
def test_any_name_in_a_manifest_makes_an_address(contest, capsys, name):
    path = contest.remote.parent.parent / "manifest.json"
    path.write_text(path.read_text().replace('"tokenizers/caseops.model"', json.dumps(name)))
    assert contest("--train-shards", 1) == 2
    assert "HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["http://[::1", "http://a:b", "http:///x", "http://a/\xe9", "http://a\x01", "a"])
def test_an_address_that_is_none_is_refused_by_the_command_line(capsys, address):
    with pytest.raises(SystemExit):
        prepare.main(["contest", "--base-url", address])
    assert "expected https://HOST, or http://HOST" in capsys.readouterr().err


def test_a_redirect_does_not_give_up_encryption():
    handler = prepare.LinkedDigest()
    request = urllib.request.Request("https://hub/x")
    headers = email.message.Message()
    with pytest.raises(urllib.error.HTTPError, match="from https to http, which is not followed"):
        handler.redirect_request(request, None, 302, "Found", headers, "http://elsewhere/x")
    assert handler.redirect_request(request, None, 302, "Found", headers, "https://elsewhere/x")


def test_the_digest_survives_a_second_redirect():
    handler = prepare.LinkedDigest()
    headers = email.message.Message()
    headers["X-Linked-Etag"] = '"abc"'
    request = urllib.request.Request("https://hub/x")
    handler.redirect_request(request, None, 302, "Found", headers, "https://first/x")
    handler.redirect_request(request, None, 302, "Found", email.message.Message(), "https://second/x")
    assert handler.sha256 == "abc"


# ---- bad networks -----------------------------------------------------------


def test_a_cut_connection_is_taken_up_where_it_broke(contest):
    name = "fineweb_train_000000.bin"
    contest.hub.faults[name] = [lambda h: h.serve(limit=1500), lambda h: h.serve(limit=700)]
    assert contest("--train-shards", 1) == 0
    assert asked(contest.hub, name) == [None, "bytes=1500-", "bytes=2200-"]
    assert (contest.datasets / CASEOPS / name).read_bytes() == (contest.remote / name).read_bytes()


def test_a_server_without_ranges_sends_it_all_again(contest):
    name = "fineweb_train_000000.bin"
    contest.hub.faults[name] = [lambda h: h.serve(limit=1500), lambda h: h.serve(ranges=False)]
    assert contest("--train-shards", 1) == 0
    assert asked(contest.hub, name) == [None, "bytes=1500-"]
    assert (contest.datasets / CASEOPS / name).read_bytes() == (contest.remote / name).read_bytes()


def test_a_server_that_answers_another_range_is_not_believed(contest):
    name = "fineweb_train_000000.bin"

    def other_range(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 0-9/10")
        handler.end_headers()
        handler.wfile.write(b"0123456789")

    contest.hub.faults[name] = [lambda h: h.serve(limit=1500), other_range]
    assert contest("--train-shards", 1) == 0
    assert asked(contest.hub, name) == [None, "bytes=1500-", "bytes=1500-"]


def busy(code: int, retry_after: str = "0"):
    def answer(handler):
        handler.send_response(code)
        handler.send_header("Retry-After", retry_after)
        handler.end_headers()

    return answer


def test_a_busy_server_is_asked_again(contest):
    contest.hub.faults["manifest.json"] = [busy(429), busy(503), lambda h: h.connection.close()]
    assert contest("--train-shards", 1) == 0
    assert len(asked(contest.hub, "manifest.json")) == 4


def test_pauses_grow_and_follow_the_server(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FIRST_PAUSE_S", 1.0)
    pauses = []
    monkeypatch.setattr(prepare.time, "sleep", pauses.append)

    hub.faults["x"] = [busy(503), busy(503), busy(429, "30")] + [busy(503)] * 9
    with pytest.raises(train_gpt.UserError, match="HTTP 503.*gave up after 6 attempts"):
        prepare.Hub(hub.url, "some/one").fetch("x", tmp_path / "x")
    assert pauses == [1, 2, 30, 8, 16]


def test_a_file_of_another_size_than_promised_is_given_up(contest, capsys):
    name = "fineweb_val_000000.bin"
    contest.hub.faults[name] = [lambda h: h.serve(promised=99)] * 20
    assert contest("--train-shards", 1) == 2
    error = capsys.readouterr().err
    assert name in error and "gave up after 6 attempts; run it again to go on" in error
    assert not (contest.datasets / CASEOPS).exists()


def test_a_later_run_goes_on_with_what_came(contest):
    name = "fineweb_train_000000.bin"
    contest.hub.faults[name] = [lambda h: h.serve(limit=1500)] + [busy(503)] * 6
    assert contest("--train-shards", 1) == 2
    assert names(contest.datasets) == [next(p.name for p in contest.datasets.glob(f".{CASEOPS}.partial*"))]
    contest.hub.faults.clear()
    assert contest("--train-shards", 1) == 0
    assert asked(contest.hub, name) == ["bytes=1500-"] and not asked(contest.hub, "fineweb_val_000000.bin")
    assert names(contest.datasets) == [CASEOPS]


def test_what_is_longer_than_the_file_is_no_beginning_of_it(hub, tmp_path):
    folder = empty_repository(hub)
    (folder / "x").write_bytes(b"short")
    (tmp_path / ".x.part").write_bytes(b"something longer")
    assert prepare.Hub(hub.url, "some/one").fetch("x", tmp_path / "x").read_bytes() == b"short"


def test_the_digest_that_the_hub_names_is_checked(hub, tmp_path):
    folder = empty_repository(hub)
    (folder / "elsewhere").write_bytes(b"content")

    def redirect(digest):
        def answer(handler):
            handler.send_response(302)
            handler.send_header("Location", handler.path.replace("large", "elsewhere"))
            handler.send_header("X-Linked-Etag", f'"{digest}"')
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return answer

    hub.faults["large"] = [redirect(hashlib.sha256(b"content").hexdigest()), redirect("0" * 64)]
    remote = prepare.Hub(hub.url, "some/one")
    assert remote.fetch("large", tmp_path / "a").read_bytes() == b"content"
    with pytest.raises(train_gpt.DataError, match="does not have the published SHA-256 0000"):
        remote.fetch("large", tmp_path / "b")
    assert names(tmp_path) == ["a", "hub"]


# ---- documents --------------------------------------------------------------


@pytest.fixture
def documents(contest):
    """The published documents: 40 for validation, of which training repeats one."""
    folder = contest.hub.root / HUB_ROOT.format(repo=prepare.PLAIN_REPOSITORY)
    path = write_lines(folder / "docs_selected.jsonl", [*TEXTS, TEXTS[3]])
    facts = {"docs_sha256": prepare.file_sha256(path), "num_docs": len(TEXTS) + 1}
    (folder / "docs_selected.source_manifest.json").write_text(json.dumps(facts))
    return folder


def test_documents_are_encoded_with_a_tokenizer_of_ours(contest, documents, capsys):
    contest.hub.faults["docs_selected.jsonl"] = [lambda h: h.serve(limit=5000)]
    arguments = ["--documents", "--val-docs", 40, "--vocab-size", 420]
    assert contest(*arguments) == 0
    assert asked(contest.hub, "docs_selected.jsonl") == [None, "bytes=5000-"]
    folder = contest.datasets / "contest_documents"
    assert read_back(folder, "val") == (TEXTS[:40], [len(t.encode()) for t in TEXTS[:40]])
    assert read_back(folder, "train")[0] == TEXTS[40:]  # the copy is left out
    assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["left_out_documents"] == 1
    assert contest(*arguments) == 0 and not contest.hub.requests
    assert contest(*arguments, "--val-docs", 41) == 2  # encoding the real text takes hours
    assert contest(*arguments, "--val-docs", 41, "--replace") == 0 and not contest.hub.requests  # the download is kept
    output = capsys.readouterr()
    assert "1 documents left out" in output.out and "warning: --val-docs 40: documents up to the 50,000th" in output.err


def test_two_preparations_do_not_write_one_download(contest, documents, capsys):
    """The second comes while the first is at it, which then goes on where its connection broke."""
    arguments = ["--documents", "--val-docs", 40, "--vocab-size", 420]
    meanwhile = []

    def come_second(handler):
        meanwhile.append(contest(*arguments, "--name", "second"))
        handler.serve()

    name = "docs_selected.jsonl"
    contest.hub.faults[name] = [lambda h: h.serve(limit=5000), come_second]
    assert contest(*arguments) == 0 and meanwhile == [2]
    assert f"{name}: another process is downloading it" in capsys.readouterr().err
    assert (contest.datasets.parent / name).read_bytes() == (documents / name).read_bytes()
    assert names(contest.datasets) == ["contest_documents"]
    assert contest(*arguments, "--name", "second") == 0 and not contest.hub.requests
    assert names(contest.datasets.parent) == ["datasets", name, "tokenizers"]


def test_documents_do_not_appear_before_they_are_checked(contest, documents, monkeypatch):
    """Else another preparation might read them, and one that was killed meanwhile would leave them."""
    seen = []
    path = contest.datasets.parent / "docs_selected.jsonl"
    check = prepare.file_sha256
    monkeypatch.setattr(prepare, "file_sha256", lambda file: seen.append(path.exists()) or check(file))
    (documents / "docs_selected.source_manifest.json").write_text(json.dumps({"docs_sha256": "0" * 64}))
    assert contest("--documents") == 2 and seen == [False]


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"docs_sha256": "0" * 64}, "does not have the published SHA-256 0000"),
        ({}, "names no docs"),
        ([], "names no docs"),
    ],
)
def test_documents_with_another_digest_are_refused(contest, documents, capsys, facts, message):
    (documents / "docs_selected.source_manifest.json").write_text(json.dumps(facts))
    assert contest("--documents") == 2
    assert message in capsys.readouterr().err
    assert names(contest.datasets.parent) == ["datasets"]


def test_the_default_split_is_the_contest_s():
    options = prepare.command_line().parse_args(["contest", "--documents"])
    assert options.val_docs == 50_000 and options.base_url == "https://huggingface.co"
