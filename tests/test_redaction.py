"""Credentials: in nothing that a run writes, logs or prints."""

import os
import stat
import subprocess
import sys

import lightning as L
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.redaction import hidden, hide_address, hide_overrides, holds_credentials, redacted, secrets_of
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests.commands.test_cli import run_forked, small
from tests.conftest import INPUTS

SECRET, NUMBER = "Xq7-top,secret", 90817263


def test_what_is_redacted():
    given = {"data": {"storage_options": {"anon": False, "key": "k", "client_kwargs": {"aws_secret": "s"}}, "key": 1}}
    assert redacted(given) == {
        "data": {"storage_options": {"anon": False, "key": "***", "client_kwargs": {"aws_secret": "***"}}, "key": 1}
    }


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"key": 12345678}, {"key": "***"}),
        ({"password": 1.5}, {"password": "***"}),
        ({"token": {"private": ["a"]}}, {"token": "***"}),
        ({"auth": ["me", "word"]}, {"auth": "***"}),
        ({"headers": {"Authorization": "Bearer x"}}, {"headers": {"Authorization": "***"}}),
        ({"client_kwargs": [{"sas_token": "x"}]}, {"client_kwargs": [{"sas_token": "***"}]}),
        ({"endpoint_url": "https://me:wo@rd@host/x"}, {"endpoint_url": "https://***@host/x"}),
        ({"config_kwargs": {"signature_version": "s3v4"}}, {"config_kwargs": {"signature_version": "s3v4"}}),
        ({"anon": True, "profile": "lab", "key": None}, {"anon": True, "profile": "lab", "key": None}),
    ],
)
@pytest.mark.parametrize("above", [["data"], ["data", "datasets", "train", 0], []])
def test_options_anywhere(given, left, above):
    def inside(options):
        node = {"storage_options": options}
        for name in reversed(above):
            node = [node] if name == 0 else {name: node}
        return node

    assert redacted(inside(given)) == inside(left)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("GET https://host/x.zarr?X-Amz-Signature=abc&X-Amz-Date=1 failed", "GET https://host/x.zarr?*** failed"),
        ("https://b.s3.amazonaws.com/x?AWSAccessKeyId=A&Expires=1", "https://b.s3.amazonaws.com/x?***"),
        ("'https://a.blob.core.windows.net/c?sv=2020&sig=x%3D'", "'https://a.blob.core.windows.net/c?***'"),
        ("https://host/x?access_token=abc", "https://host/x?***"),
        ("https://storage.googleapis.com/b/x?X-Goog-Credential=a", "https://storage.googleapis.com/b/x?***"),
        ("s3://me:word@bucket/x", "s3://***@bucket/x"),
        ("zip://in/x::https://me:word@host/x.zip", "zip://in/x::https://***@host/x.zip"),
        ("https://host/x?versionId=3", "https://host/x?versionId=3"),
        ("zip://a@b/c::/data/x.zip", "zip://a@b/c::/data/x.zip"),
        ("/data/me@lab/x?.zarr", "/data/me@lab/x?.zarr"),
    ],
)
def test_addresses(text, left):
    assert hide_address(text) == hidden(text) == left
    assert holds_credentials({"a": [text]}) == (text != left)
    assert str(CellMapFileNotFoundError(text)) == str(CellMapValueError(text)) == str(CellMapError(text)) == left


@pytest.mark.parametrize(
    "override",
    ["data.storage_options={anon: true}", "data.storage_options={}", "++data.storage_options.anon=true",
     "data.storage_options=null"],
)  # fmt: skip
def test_overrides_that_are_no_secret(override):
    assert hide_overrides(override) == override
    assert hide_overrides(f"{override},b=1 {override}") == f"{override},b=1 {override}"


@pytest.mark.parametrize(
    "override",
    [
        "data.storage_options={key: X, secret: word}", "++data.storage_options.key='word'",
        "data.storage_options.secret=word", "+data.datasets={train: [{raw: a, storage_options: {key: word}}]}",
        'data.datasets={train:[{raw:a,"storage_options":{key:word}}]}',
        "data.datasets.train[0].storage_options.key=word",
    ],
)  # fmt: skip
def test_overrides(override):
    assert "word" not in hide_overrides(override)
    assert redacted({"hydra": {"overrides": {"task": [override]}, "job": {"override_dirname": f"a=1,{override}"}}}) == {
        "hydra": {
            "overrides": {"task": [hide_overrides(override)]},
            "job": {"override_dirname": f"a=1,{hide_overrides(override)}"},
        }
    }


def test_secrets_that_other_settings_repeat():
    config = {"mine": "abcd-efgh", "number": NUMBER, "storage_options": {"key": "abcd-efgh", "token": NUMBER}}
    config |= {"text": "x abcd-efgh", "classes": ["mito"], "short": "mito"}
    config["storage_options"]["secret"] = "mito"
    assert redacted(config, secrets_of(config)) == {
        "mine": "***", "number": "***", "storage_options": {"key": "***", "token": "***", "secret": "***"},
        "text": "x ***", "classes": ["mito"], "short": "mito",
    }  # fmt: skip


# -- runs

EXPERIMENT = "# @package _global_\n"


def entries(volume, options):
    crop = f"{volume.path}/recon-1/labels/groundtruth"
    return {
        split: [{"raw": str(volume.raw_path), "gt": f"{crop}/{name}/[mito,er]", "storage_options": options}]
        for split, name in (("train", "crop2"), ("validate", "crop3"))
    }


def files_with(folder, *secrets):
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and "modules" not in file.parts and "mine" not in file.parts:
            content = file.read_bytes()
            found += [file for secret in secrets if secret.encode() in content]
    return found


WAYS = {
    "an override": [f"data.storage_options={{key: '{SECRET}', secret: {NUMBER}}}"],
    "an override in quotes": [f'data.storage_options={{key: "{SECRET}", token: "{NUMBER}"}}'],
    "dotted overrides": ["data.storage_options={}", f"++data.storage_options.key='{SECRET}'",
                         f"++data.storage_options.password={NUMBER}"],
    "another key": [f"+mine='{SECRET}'", f"+number={NUMBER}",
                    "data.storage_options={key: '${mine}', token: '${number}'}"],
    "an address": [f"data.class_table='https://me:{NUMBER}@host/x?sig=Xq7-top,secret'"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_run_writes_no_secrets(volume, tmp_path, way):
    more = ["trainer.max_epochs=1", "hydra.run.dir=runs/out", "logger=csv"]
    code, text = run_forked(*small(volume, *WAYS[way], *more), cwd=tmp_path)
    assert code == 0, text
    assert files_with(tmp_path, SECRET, str(NUMBER)) == []
    out = tmp_path / "runs" / "out"
    assert (out / "checkpoints" / "best.ckpt").exists()
    assert "***" in (out / ".hydra" / "overrides.yaml").read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["classes"] == ["mito", "er"]


@pytest.mark.parametrize("where", ["an experiment", "a sweep", "a sweep of secrets", "a run that fails at once"])
def test_secrets_of_entries(volume, tmp_path, where):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    data = {"csv_path": None, "datasets": entries(volume, {"key": SECRET, "client_kwargs": {"password": NUMBER}})}
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(EXPERIMENT + yaml.safe_dump({"data": data}))
    given = ["--config-dir", "mine", "experiment=x", *(a for a in small(volume) if "csv_path" not in a)]
    given += ["trainer.max_epochs=1", "hydra.run.dir=out", "hydra.sweep.dir=out"]
    if where == "a run that fails at once":
        given.append("model.channels=abc")
    if where.startswith("a sweep"):
        given = ["-m", *given, "seed=1"]
    if where == "a sweep of secrets":
        given.append(f"+data.storage_options.secret={SECRET.replace(',', '')},{NUMBER}")
    code, text = run_forked(*given, cwd=tmp_path)
    assert (code == 0) == (where != "a run that fails at once"), text
    assert files_with(tmp_path, SECRET, SECRET.replace(",", ""), str(NUMBER)) == []
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    noted = [p for p in tmp_path.rglob("*.yaml") if p.parent.name == ".hydra"]
    assert len(noted) == {"a sweep": 3, "a sweep of secrets": 6}.get(where, 3)
    assert "***" in next(p for p in noted if p.name == "config.yaml").read_text()


def test_a_run_without_credentials_is_open(volume, tmp_path):
    code, text = run_forked(
        *small(volume, "trainer.fast_dev_run=true", "hydra.run.dir=out", "data.storage_options={anon: true}"),
        cwd=tmp_path,
    )
    assert code == 0, text
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert "anon: true" in (tmp_path / "out" / ".hydra" / "overrides.yaml").read_text()


def test_an_error_that_nothing_expects_prints_no_secrets(volume, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "broken.py").write_text(
        "import lightning as L\nclass Broken(L.Callback):\n"
        "    def on_fit_start(self, trainer, module):\n        raise RuntimeError('no such thing')\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    code, text = run_forked(
        *small(volume, f"data.storage_options={{key: '{SECRET}', secret: {NUMBER}}}", "hydra.run.dir=out"),
        "+callbacks.broken._target_=broken.Broken", cwd=tmp_path,
    )  # fmt: skip
    assert code == 1
    assert "RuntimeError: no such thing" in text
    assert files_with(tmp_path, SECRET, str(NUMBER)) == [], text


def plain(value):
    return value


def nested(value):
    """A configuration of OmegaConf inside of plain containers."""
    return {"train": OmegaConf.create(value["train"])} if "train" in value else OmegaConf.create(value)


@pytest.mark.parametrize("form", [plain, OmegaConf.create, nested])
def test_hyperparameters_hold_no_secrets(volume, form):
    class Mine(CellMapDataModule):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    options = {"key": SECRET, "token": NUMBER}
    given = {"classes": ["mito", "er"], "input_arrays": INPUTS, "target_arrays": INPUTS, "batch_size": 1}
    data = Mine(**given, datasets=form(entries(volume, options)), storage_options=form(options))
    assert data.hparams["storage_options"] == data.hparams_initial["storage_options"] == {"key": "***", "token": "***"}
    assert SECRET not in str(data.hparams)
    assert str(NUMBER) not in str(data.hparams_initial)
    assert len(data.hparams["datasets"]["train"]) == len(entries(volume, options)["train"])
    assert data.hparams["classes"] == ["mito", "er"]
    assert isinstance(data, L.LightningDataModule)


def test_hyperparameters_without_secrets_are_unchanged():
    class Mine(CellMapDataModule):
        def __init__(self, window=None, settings=None, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    settings = OmegaConf.create({"a": [1, 2], "b": "${a}"})
    options = OmegaConf.create({"key": "${oc.env:NO_SUCH_VARIABLE}", "anon": False})
    crops = {"train": [{"raw": "x.zarr"}]}
    data = Mine((3, ("x", 4)), settings, input_arrays=INPUTS, datasets=crops, storage_options=options)
    assert data.hparams["window"] == (3, ("x", 4))
    assert data.hparams["settings"] is not None
    assert OmegaConf.to_container(data.hparams["settings"], resolve=True) == {"a": [1, 2], "b": [1, 2]}
    assert data.hparams["storage_options"] == {"key": "***", "anon": False}


def test_addresses_in_a_csv_of_splits_and_their_return(tmp_path):
    raw, gt = "https://me:word@host/x.zarr/em", "https://me:word@host/x.zarr/crop1/[mito]"
    datasets = {"train": [{"raw": raw, "gt": gt}]}
    module = CellMapDataSplit(datasets=datasets, classes=["mito"], input_arrays=INPUTS, target_arrays=INPUTS)
    module.write_csv(tmp_path / "split.csv")
    text = (tmp_path / "split.csv").read_text()
    assert "word" not in text
    assert "https://***@host/x.zarr/em" in text
    with pytest.raises(CellMapValueError, match="credentials were hidden where it was saved"):
        parse_location("https://***@host/x.zarr/em")
    assert "word" not in parse_location(raw).identity


def test_a_log_line_with_an_address(tmp_path):
    code = (
        "import logging, sys\nfrom cellmap_lightning.commands.private_run import protect_logs\nprotect_logs([])\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "logging.getLogger('x').warning('GET %s', 'https://me:word@host/x?sig=abc')\n"
        "logging.getLogger('x').warning('#0 : data.storage_options={key: word} seed=1')\n"
        "logging.getLogger('x').warning('%d %s', 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60
    )
    assert "GET https://***@host/x?***" in done.stdout
    assert "word" not in done.stdout
    assert "abc" not in done.stdout
    assert done.returncode == 0


def test_advice_on_options_is_not_hidden():
    advice = "give data.storage_options={...}, or have them in the environment"
    assert hidden(advice, ["secret"]) == advice


def test_what_a_checkpoint_holds(volume, tmp_path):
    code, text = run_forked(
        *small(volume, f"data.storage_options={{key: '{SECRET}'}}", "trainer.max_epochs=1", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert code == 0, text
    content = torch.load(tmp_path / "out" / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["cellmap_config"]["data"]["storage_options"] == {"key": "***"}
