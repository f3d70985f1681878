"""Upload and download decompositions with their card and the identity of their model's weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import l3d
from l3d.analysis.description import describe
from l3d.storage.card import model_card
from l3d.storage.hub import FILES
from l3d.storage.identity import check_identity, fingerprint, identity

import fake_hub


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


DATA = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained() -> l3d.Decomposition:
    model = network()
    model.name_or_path = "python:tests:network"  # type: ignore[assignment]
    return l3d.decompose(model, DATA, 3, 1, 0.5, "0.*", steps=4, callbacks=[])


# --- whose weights ----------------------------------------------------------------------------------------------

USES: dict[str, Callable[..., Any]] = {
    "evaluate": lambda d, model, **options: d.evaluate(model, DATA, **options),
    "impact": lambda d, model, **options: d.impact(model, DATA, 1, **options),
    "top_samples": lambda d, model, **options: l3d.top_samples(d, model, DATA, 2, 1, **options),
    "intervene": lambda d, model, **options: l3d.intervene(model, d, {0: 0.5}, **options).__enter__(),
    "top_logits": lambda d, model, **options: l3d.top_logits(model, d, 0, DATA[:4], 2, **options),
    "describe": lambda d, model, **options: describe(d, model, DATA, **options),
    "finetune": lambda d, model, **options: l3d.finetune(
        model, d, TensorDataset(DATA, DATA[:, :3]), nn.functional.mse_loss, [0], steps=1, **options
    ).state_dict(),
}


@pytest.mark.parametrize("use", USES)
def test_other_weights_are_refused_unless_asked(use: str, trained: l3d.Decomposition) -> None:
    """Whatever uses a decomposition on a model refuses another seed's weights, and goes on where asked to."""
    USES[use](trained, network())
    with pytest.raises(ValueError, match=r"model: '0.weight' has other values: .* of python:tests:network that were"):
        USES[use](trained, network(1))
    USES[use](trained, network(1), any_weights=True)


def test_only_decomposed_parameters_count(trained: l3d.Decomposition) -> None:
    """Another head is no other model; another dtype is, and is named."""
    model = network()
    nn.init.ones_(model[2].weight)  # type: ignore[arg-type]
    trained.evaluate(model, DATA)
    with pytest.raises(ValueError, match=r"'0.weight' is float64, was float32"):
        trained.evaluate(network().double(), DATA.double())
    one_bit = network()
    bits = dict(one_bit.named_parameters())["0.bias"].detach().view(torch.int32)
    bits[3] ^= 1
    with pytest.raises(ValueError, match=r"'0.bias' has other values"):
        trained.evaluate(one_bit, DATA)


def test_interventions_nest_and_can_be_evaluated(trained: l3d.Decomposition) -> None:
    """Weights that an intervention moved were checked before; afterwards they are checked again."""
    model = network()
    with l3d.intervene(model, trained, {0: 0.5}):
        trained.evaluate(model, DATA)
        with l3d.intervene(model, trained, {1: 0.5}):
            trained.impact(model, DATA, 1)
        trained.impact(model, DATA, 1)
    trained.evaluate(model, DATA)
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="has other values"):
        trained.evaluate(model, DATA)


def test_the_identity_survives_saving(trained: l3d.Decomposition, tmp_path: Path) -> None:
    """It is saved, loaded and kept by checkpoints; a file from before there was one fits any weights."""
    trained.save(tmp_path)
    again = l3d.load(tmp_path)
    assert again.base_model == trained.base_model
    assert again.base_model["parameters"] == {n: fingerprint(p) for n, p in network().named_parameters() if n[0] == "0"}
    header = json.loads((tmp_path / "decomposition.json").read_text())
    del header["base_model"]
    (tmp_path / "decomposition.json").write_text(json.dumps(header))
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"has no manifest\.json"):
        l3d.load(tmp_path).evaluate(network(1), DATA)


def test_a_run_is_not_resumed_on_other_weights(tmp_path: Path) -> None:
    """A checkpoint goes on with the model it was made of, and no other."""
    arguments: dict[str, Any] = {"n_subnetworks": 2, "rank": 1, "steps": 4, "out": tmp_path, "callbacks": []}
    l3d.decompose(network(), DATA, checkpoint_every=2, **arguments)
    with pytest.raises(ValueError, match="are not the weights of Sequential"):
        l3d.decompose(network(1), DATA, existing="resume", **arguments)


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    """Nor with other rows, more of them, or another reference."""
    arguments: dict[str, Any] = {"n_subnetworks": 2, "rank": 1, "steps": 4, "callbacks": [], "checkpoint_every": 2}

    def run(folder: str, data: Any, existing: str = "refuse", **changed: Any) -> l3d.Decomposition:
        return l3d.decompose(network(), data, out=tmp_path / folder, existing=existing, **(arguments | changed))

    run("rows", DATA)
    for other in (DATA + 1, DATA[:-1], TensorDataset(DATA)):
        with pytest.raises(ValueError, match="resume: data differ from the interrupted run's; pass the same arguments"):
            run("rows", other, existing="resume")
    run("rows", DATA.clone(), existing="resume")
    run("reference", DATA, reference=torch.zeros(3))
    with pytest.raises(ValueError, match="resume: reference differ"):
        run("reference", DATA, existing="resume", reference=torch.ones(3))
    run("dataset", TensorDataset(DATA))
    for other in (TensorDataset(DATA + 1), TensorDataset(DATA[1:])):
        with pytest.raises(ValueError, match="resume: data differ"):
            run("dataset", other, existing="resume")
    run("dataset", TensorDataset(DATA.clone()), existing="resume")
    for state in tmp_path.glob("rows/checkpoints/*/state.json"):
        state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "seen"}))
        state.with_name("manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"has no manifest\.json"):
        run("rows", DATA + 1, existing="resume")  # one of before these were told


def test_a_local_folder_is_named_without_its_path(tmp_path: Path) -> None:
    """Names come from the user, the configuration or the class; a hub's commit comes along."""
    model: Any = network()
    parameters: dict[str, Tensor] = {}
    assert identity(model, parameters)["name"] == "Sequential"
    model.config = type("Config", (), {"_name_or_path": str(tmp_path), "_commit_hash": None})
    assert identity(model, parameters)["name"] == tmp_path.name
    model.config = type("Config", (), {"_name_or_path": "user/name", "_commit_hash": "abc"})
    assert identity(model, parameters) == {"name": "user/name", "revision": "abc", "parameters": {}}
    check_identity({}, parameters)


def test_fingerprints_tell_entries_dtypes_and_nothing_else() -> None:
    """Strides do not matter; the sign of zero, the order and the dtype do."""
    matrix = torch.arange(6.0).view(2, 3)
    assert fingerprint(matrix) == fingerprint(matrix.T.contiguous().T)
    different = [matrix, matrix.flip(0), matrix.double(), matrix.bfloat16(), -matrix, torch.zeros(2, 3)[:0]]
    assert len({fingerprint(each) for each in different}) == len(different)


# --- the card ---------------------------------------------------------------------------------------------------


def test_the_card_tells_what_was_decomposed(trained: l3d.Decomposition, tmp_path: Path) -> None:
    """Model, tensors with ranks and hashes, settings and figures; saving again renews it."""
    trained.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: l3d\n")
    for part in (
        "# 3 subnetworks of python:tests:network",
        "| `0.weight` | [6, 4] | [1] | float32:",
        "| `0.bias` | [6] | whole |",
        "| divergence | mse |",
        "| k | 0.5 |",
        "error over the last tenth of training",
    ):
        assert part in card
    trained.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


def test_a_readme_of_the_users_own_stays(trained: l3d.Decomposition, tmp_path: Path) -> None:
    """Saving into a folder that has a README leaves it alone."""
    (tmp_path / "README.md").write_text("# mine\n")
    trained.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine\n"


def test_names_cannot_break_out_of_the_card() -> None:
    """A name with table or markup signs stays text."""
    header = {
        "n_subnetworks": 1, "shapes": {"a|b`<script>": [1]}, "ranks": {}, "settings": {},
        "base_model": {"name": 'x\n---\n<script>/"'},
    }  # fmt: skip
    card = model_card(header, {})
    assert "<script>" not in card
    assert card.count("\n---\n") == 1


# --- the hub ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the hub's client waits longer and longer between its tries
import l3d
from l3d.cli.main import main

answers = {}

def attempt(name, call):
    try:
        answers[name] = str(call())
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

d = l3d.load(sys.argv[1])
token = sys.argv[2]
attempt("push without permission", lambda: d.push_to_hub("me/other", token=False))
attempt("push", lambda: d.push_to_hub("hf://me/tms", token=token))
attempt("pull", lambda: (l3d.load("hf://me/tms").save("pulled"), "pulled")[1])
attempt("pull a revision", lambda: l3d.load("hf://me/tms@main").n_subnetworks)
attempt("no such revision", lambda: l3d.load("hf://me/tms@v2"))
attempt("no such repository", lambda: l3d.load("hf://me/none"))
attempt("gated", lambda: l3d.load("hf://me/gated"))
attempt("of something else", lambda: l3d.load("hf://me/else"))
attempt("cut short", lambda: l3d.load("hf://me/short"))
attempt("damaged", lambda: l3d.load("hf://me/damaged"))
attempt("older and damaged", lambda: l3d.load("hf://me/older"))
attempt("no address", lambda: l3d.load("hf://me"))
for name in ("none", "gated", "short"):
    command = ["decompose", "--model", f"hf:me/{name}", "--data", "text:texts.txt", "--out", f"run-{name}"]
    answers[f"decompose {name}"] = main(command)
answers["folders"] = [path.name for path in Path(".").glob("run-*")]
print(json.dumps(answers))
"""


def run_script(folder: Path, trained: l3d.Decomposition, endpoint: str) -> tuple[dict[str, Any], str]:
    """Run the script in a process whose hub is `endpoint`; return what each step said, and stderr."""
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    trained.save(folder / "saved")
    (folder / "texts.txt").write_text("some text")
    home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    path = os.pathsep.join([str(Path(l3d.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "saved"), fake_hub.TOKEN],
        cwd=folder, env={**os.environ, **home, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_to_the_hub_and_back(trained: l3d.Decomposition, tmp_path: Path) -> None:
    """What is pushed comes back bit by bit with its card; whatever the hub refuses is one line, and no run folder."""
    with fake_hub.running() as hub:
        trained.save(tmp_path / "saved")
        files = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
        hub.files |= {"me/gated": dict(files), "me/else": {"model.bin": b"x"}, "me/short": dict(files)}
        hub.files["me/short"] |= {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": bytes(100)}
        hub.files["me/damaged"] = {**files, "decomposition.safetensors": files["decomposition.safetensors"][:-10]}
        hub.files["me/older"] = {k: v for k, v in hub.files["me/damaged"].items() if k != "manifest.json"}
        hub.gated.add("me/gated")
        hub.cut_short |= {"model.safetensors"}
        answers, errors = run_script(tmp_path, trained, hub.endpoint)
        stored = hub.files["me/tms"]
    assert answers["push"].startswith(f"{hub.endpoint}/me/tms/commit/")
    assert set(stored) - {".gitattributes"} == set(files) == {*FILES}
    assert stored["decomposition.safetensors"] == files["decomposition.safetensors"]
    assert answers["pull"] == "pulled"
    for name, content in files.items():
        assert (tmp_path / "pulled" / name).read_bytes() == content
    assert answers["pull a revision"] == "3"
    for step, message in {
        "push without permission": "hf://me/other: cannot be uploaded: ",
        "no such revision": "hf://me/tms: cannot be downloaded: 404",
        "no such repository": "hf://me/none: cannot be downloaded: 404",
        "gated": "hf://me/gated: cannot be downloaded: 403",
        "of something else": "hf://me/else: holds no decomposition.json",
        "damaged": "decomposition.safetensors: damaged: its SHA-256 is not the one in manifest.json",
        "older and damaged": "not a valid safetensors file",
        "no address": "repo_id: expected USER/NAME",
    }.items():
        assert answers[step].startswith("ValueError: ")
        assert message in answers[step]
        assert "\n" not in answers[step]
    assert [answers[f"decompose {name}"] for name in ("none", "gated", "short")] == [2, 2, 2]
    assert errors.count("l3d: error: hf:me/") == 3
    assert answers["folders"] == []


def test_no_hub(trained: l3d.Decomposition, tmp_path: Path) -> None:
    """Where nothing answers, every step says so in one line, and no run folder is made."""
    with fake_hub.running() as hub:
        endpoint = hub.endpoint
    answers, errors = run_script(tmp_path, trained, endpoint)
    for step in ("push", "pull", "gated"):
        assert answers[step].startswith("ValueError: hf://me/")
        assert "\n" not in answers[step]
    assert answers["decompose none"] == 2
    assert errors.count("l3d: error: hf:me/") == 3
    assert answers["folders"] == []
