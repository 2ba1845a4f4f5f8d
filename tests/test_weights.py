"""Checkpoints come and go unchanged, on any number of ranks, and whatever is wrong with a folder is said, not guessed.

Oracles: `transformers` reads what we write and writes what we read; the file format's own bytes; one process for two.
Anything a file can contain ends in a network or in a UserError: hypothesis looks for a third way out.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from minisft.errors import NumericsError, UserError, printable
from minisft.model import weights
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig, RopeScaling
from minisft.pretrained import from_pretrained, save_pretrained

CONFIG = LlamaConfig(vocab_size=37, hidden_size=16, intermediate_size=22, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=6, attention_bias=True, bos_token_id=1, eos_token_id=[2, 3],
                     rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
RAW = {"model_type": "llama", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}


def random_model(config: LlamaConfig = CONFIG) -> Llama:
    model = Llama(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def refusal(action: Any, *args: Any) -> str:
    with pytest.raises((UserError, NumericsError)) as caught:
        action(*args)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, to be spoiled."""
    save_pretrained(random_model(), tmp_path, dtype=torch.float32)
    return tmp_path


# Round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_write(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig(**{**vars(CONFIG), "head_dim": 4, "tie_word_embeddings": tied})
    model = random_model(config)
    weights.save(model, config, tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.arange(60) % 37
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens[None]).logits[0], atol=1e-5, rtol=0)
    ours = from_pretrained(tmp_path)
    assert ours.config == config
    assert torch.equal(ours.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize("shard_size", ["1GB", "6KB"])
def test_we_read_what_transformers_writes_bit_for_bit(shard_size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RAW))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard_size == "6KB")
    model = from_pretrained(tmp_path / "theirs")
    state = theirs.state_dict()
    assert dict(model.named_parameters()).keys() == state.keys()
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    save_pretrained(model, tmp_path / "ours", dtype=torch.float32)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


@pytest.mark.parametrize("head", ["its own", "a copy", "a copy in another dtype", "none", "another shape"])
def test_a_tied_model_with_a_head_in_the_file_is_what_transformers_makes_of_it(head: str, tmp_path: Path) -> None:
    """A head unlike the embedding unties the model, here and in what is written; a copy is redundant."""
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig(**{**vars(CONFIG), "head_dim": 4, "tie_word_embeddings": True})
    save_pretrained(random_model(config), tmp_path, dtype=torch.float32)
    state = {name: p.bfloat16().float() for name, p in load_file(tmp_path / "model.safetensors").items()}
    copy = state["model.embed_tokens.weight"].clone()
    heads = {"its own": copy.clone(), "a copy": copy, "a copy in another dtype": copy.bfloat16(),
             "another shape": copy[:30].clone()}
    heads["its own"][-1, -1] += 1  # in the last number only
    save_file(state | ({"lm_head.weight": heads[head]} if head in heads else {}), tmp_path / "model.safetensors")
    if head == "another shape":
        assert "lm_head.weight: the file has [30, 16]" in refusal(from_pretrained, tmp_path)
        return
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(60) % 37
    for path in (tmp_path, tmp_path / "written"):
        ours = from_pretrained(path)
        assert ours.config.tie_word_embeddings == (head != "its own")
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(tokens), theirs(tokens[None]).logits[0], atol=1e-5, rtol=0)
        if path == tmp_path:
            save_pretrained(ours, tmp_path / "written", dtype=torch.float32)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.bfloat16), (float("inf"), torch.float16),
                                              (-float("inf"), torch.float32)])
def test_a_number_that_is_not_finite_is_found_while_loading(folder: Path, name: str, value: float,
                                                            dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    state[name].view(-1)[-1] = value
    save_file(state, folder / "model.safetensors")
    message = refusal(from_pretrained, folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: {name} has numbers that are not finite")


def test_finite_numbers_whose_sum_overflows_are_finite(folder: Path) -> None:
    state = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    state["model.norm.weight"][:] = 60_000
    save_file(state, folder / "model.safetensors")
    assert (from_pretrained(folder).model.norm.weight == 60_000).all()


def test_a_hostile_tensor_name_is_printed_harmlessly(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "\x1b[2Jevil\n" + "x" * 5000: torch.zeros(1)}, folder / "model.safetensors")
    message = refusal(from_pretrained, folder)
    assert "  \\x1b[2Jevil\\nxxxx" in message
    assert len(message) < 500
    save_file({**state, "\x1b[2Jevil": torch.zeros(1, dtype=torch.int8)}, folder / "model.safetensors")
    assert ": \\x1b[2Jevil is stored as I8" in refusal(from_pretrained, folder)


def test_weights_larger_than_the_memory_are_refused_before_any_is_allocated(folder: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}.get)
    assert "the weights need 0.0 GiB and this machine has 0.0 GiB of memory" in refusal(from_pretrained, folder)


@pytest.mark.parametrize(("file", "remedy"), [
    ("adapter_config.json", "it holds an adapter; `minisft convert {folder} TARGET --merge` makes one model of it"),
    ("model-Q4_K_M.gguf", "it has model-Q4_K_M.gguf: GGUF files are made for inference"),
    ("pytorch_model.bin", "it has pytorch_model.bin: pickles are not read"),
    ("consolidated.00.pth", "`minisft train` with --model.format meta, and by `minisft convert`")])
def test_what_a_folder_without_safetensors_has_instead(tmp_path: Path, file: str, remedy: str) -> None:
    (tmp_path / file).write_text("{}")
    assert remedy.format(folder=tmp_path) in refusal(weights.SafetensorsFolder, tmp_path)
    assert "is a file" in refusal(weights.SafetensorsFolder, tmp_path / file)


def test_shards_are_as_large_as_allowed_and_indexed(tmp_path: Path) -> None:
    model = random_model()
    weights.save(model, CONFIG, tmp_path, dtype=torch.bfloat16, shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 2000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total == sum(2 * p.numel() for p in model.parameters())


def test_a_stored_dtype_is_converted_to_the_networks(folder: Path) -> None:
    exact = dict(from_pretrained(folder).named_parameters())
    for stored in (torch.bfloat16, torch.float16):
        save_file({name: p.detach().to(stored) for name, p in exact.items()}, folder / "model.safetensors")
        for name, parameter in from_pretrained(folder).named_parameters():
            assert torch.equal(parameter, exact[name].to(stored).float())


def test_files_are_readable_by_others_as_the_umask_says(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_what_cannot_be_written_is_an_input_output_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors: cannot be written"):
        weights.save(random_model(), random_model().config, tmp_path)


def test_a_model_is_never_written_over_another(folder: Path) -> None:
    with pytest.raises(UserError, match="holds a model already; choose another folder"):
        save_pretrained(random_model(), folder)


# Refusals of weights


def test_every_truncation_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{file}: not a readable safetensors file (" in refusal(from_pretrained, folder)
    file.write_bytes(whole + b"\0")
    assert "download or export it again" in refusal(from_pretrained, folder)


HEADERS = st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["lm_head.weight", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4),
).map(lambda value: json.dumps(value).encode())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1))
def test_a_garbage_header_is_refused(folder: Path, header: bytes, length: int | None) -> None:
    claimed = struct.pack("<Q", len(header) if length is None else length)
    (folder / "model.safetensors").write_bytes(claimed + header)
    refusal(from_pretrained, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_quantised_weights_are_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(from_pretrained, folder)
    assert "model.layers.0.mlp.up_proj.weight is stored as" in message
    assert "quantised weights cannot be fine-tuned, only F32, BF16, F16" in message


def test_missing_extra_and_misshaped_tensors_are_named_ten_at_a_time(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:36].clone()
    tensors["score.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(from_pretrained, folder)
    assert f"{folder}: weights and config.json disagree" in message
    assert "\n  model.norm.weight: missing" in message
    assert "\n  lm_head.weight: the file has [36, 16], config.json asks for [37, 16]" in message
    assert "\n  score.weight: not part of the model that config.json describes" in message
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    message = refusal(from_pretrained, folder)
    parameters = sum(1 for _ in random_model().parameters())
    assert message.count(": missing") == 10
    assert message.endswith(f"and {parameters + 1 - 10} more")


def test_tables_and_tied_heads_of_old_files_are_no_error(tmp_path: Path) -> None:
    config = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": True})
    save_pretrained(random_model(config), tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    from_pretrained(tmp_path)


def test_pickles_are_refused_with_a_remedy(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = refusal(from_pretrained, tmp_path)
    assert "no model.safetensors and no model.safetensors.index.json; it has pytorch_model.bin: pickles are" in message
    assert "convert them to safetensors" in message
    (tmp_path / "pytorch_model.bin").unlink()
    assert "download the model again" in refusal(from_pretrained, tmp_path)
    assert "no such folder" in refusal(from_pretrained, tmp_path / "nowhere")


# Refusals of an index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    weights.save(random_model(), CONFIG, tmp_path, shard_bytes=2000)
    return tmp_path


def edit_index(folder: Path, **changes: Any) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "./x.safetensors",
                                  "..", "", "model.bin", "model.safetensors.pt", 3, None, True])
def test_an_index_names_only_safetensors_files_of_its_folder(sharded: Path, name: Any) -> None:
    (sharded / "sub").mkdir()
    save_file({"lm_head.weight": torch.zeros(37, 16)}, sharded / "sub" / "x.safetensors")
    edit_index(sharded, **{"lm_head.weight": name})
    message = refusal(weights.SafetensorsFolder, sharded)
    assert message.endswith(f"index.json: {name!r} is not the name of a safetensors file in this folder; refused")


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "nul\0.safetensors", "\ud800.safetensors"])
def test_a_name_that_no_file_can_have_is_a_missing_shard(sharded: Path, name: str) -> None:
    edit_index(sharded, **{"lm_head.weight": name})
    message = refusal(weights.SafetensorsFolder, sharded)
    assert message.encode()
    assert message.endswith(f"{printable(repr(name))} is listed but missing; download the model again")


def test_a_missing_shard_and_a_missing_tensor_are_named(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    edit_index(sharded, **{"model.layers.9.mlp.up_proj.weight": first.name})
    message = refusal(weights.SafetensorsFolder, sharded)
    assert "the index lists tensors that its files lack" in message
    assert f"'model.layers.9.mlp.up_proj.weight' (in {first.name})" in message
    first.unlink()
    message = refusal(weights.SafetensorsFolder, sharded)
    assert f"'{first.name}' is listed but missing; download the model again" in message


def test_a_tensor_that_the_index_omits_is_missing(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["lm_head.weight"]
    file.write_text(json.dumps(index))
    assert "lm_head.weight: missing" in refusal(from_pretrained, sharded)


def test_a_single_file_beside_an_index_that_does_not_list_it_is_ambiguous(sharded: Path) -> None:
    # transformers would read the single file, an index reader the other
    weights.save(random_model(), random_model().config, sharded)
    assert "one of the two is out of date; delete it" in refusal(from_pretrained, sharded)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
FILE_NAME = st.text(max_size=9).map(lambda name: f"{name}.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(
    st.binary(max_size=30), ANY_JSON.map(lambda value: json.dumps(value).encode()),
    ANY_JSON.map(lambda value: json.dumps({"weight_map": value}).encode()),
    st.dictionaries(st.text(max_size=6), ANY_JSON | FILE_NAME, max_size=3)
      .map(lambda value: json.dumps({"weight_map": value}).encode()),
    st.sampled_from([b"[" * 100_000, b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}"])))
def test_any_other_index_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text)
    refusal(weights.SafetensorsFolder, sharded)


# Several ranks


def test_initialization(tmp_path: Path) -> None:
    model = Llama(CONFIG)
    weights.initialize(model, std=0.02, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith(".bias"):
            assert bool((parameter == 0).all())
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    other = Llama(CONFIG)
    weights.initialize(other, std=0.02, seed=4)
    same = [name for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True)
            if torch.equal(a, b) and not name.endswith(("norm.weight", ".bias"))]
    assert same == []
    matrices = [p.flatten()[:6] for n, p in model.named_parameters() if p.dim() == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def _rank(rank: int, folder: Path) -> None:
    """Rank 0 writes what the parent compares: the whole tensors after `load` and after `initialize`, and a save."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    with torch.device("meta"):
        model = Llama(CONFIG)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    source = weights.SafetensorsFolder(folder / "source")
    weights.check(model, source)
    model.to_empty(device="cpu")
    uneven = [n for n, p in model.named_parameters() if isinstance(p, DTensor) and p.shape[0] % 2]
    weights.load(model, source)
    loaded = {name: whole(parameter) for name, parameter in model.named_parameters()}
    weights.save(model, CONFIG, folder / "saved", dtype=torch.float32)
    weights.save(model, CONFIG, folder / "sharded", shard_bytes=2000)
    weights.initialize(model, std=0.02, seed=11)
    initial = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        assert "model.embed_tokens.weight" in uneven
        save_file(loaded, folder / "loaded.safetensors")
        save_file(initial, folder / "initial.safetensors")
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's that outlives the interpreter aborts the process (seen once)


def whole(parameter: DTensor) -> Tensor:
    """The tensor as the ranks' rows laid one after another: not by `full_tensor`, which `save` relies on."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, parameter.to_local())
    return torch.cat(rows).clone()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    model = random_model()
    save_pretrained(model, tmp_path / "source", dtype=torch.float32)
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    loaded, initial = (load_file(tmp_path / f"{name}.safetensors") for name in ("loaded", "initial"))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter), name
    weights.initialize(model, std=0.02, seed=11)
    for name, parameter in model.named_parameters():
        assert torch.equal(initial[name], parameter), name
    for file in (tmp_path / "source").iterdir():
        assert file.read_bytes() == (tmp_path / "saved" / file.name).read_bytes(), file.name
    weights.save(random_model(), CONFIG, tmp_path / "alone", shard_bytes=2000)
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "sharded" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("rows", "ranks"), [(10, 4), (1, 2), (3, 8), (37, 2), (8, 8), (5, 4)])
def test_ranks_divide_rows_as_torch_chunk_does(rows: int, ranks: int) -> None:
    """10 rows on 4 ranks are 3, 3, 3, 1; with each group of ranks repeated, too. The process group is simulated."""
    whole_tensor = torch.arange(rows)[:, None]
    chunks = [*whole_tensor.chunk(ranks), *[whole_tensor[:0]] * ranks]
    for rank in range(2 * ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2 * ranks)
        try:
            mesh = init_device_mesh("cpu", (2, ranks))
            tensor = DTensor.from_local(chunks[rank % ranks], mesh, [Replicate(), Shard(0)], run_check=False,
                                        shape=torch.Size((rows, 1)), stride=(1, 1))
            local, start = weights.local_rows(tensor)
            assert torch.equal(local, whole_tensor[start : start + len(local)])
            assert len(local) == len(chunks[rank % ranks])
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("piece", [1, 100, 2**24])
def test_pieces_are_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Read by several threads in pieces of any size, a model is what safetensors reads."""
    monkeypatch.setattr(weights, "PIECE", piece)
    loaded = dict(from_pretrained(folder).named_parameters())
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in expected.items())


def test_a_file_that_is_cut_off_after_it_was_opened(folder: Path) -> None:
    checkpoint, file = weights.SafetensorsFolder(folder), folder / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    text = refusal(weights.load, random_model(), checkpoint)
    assert text.startswith(f"{file}: ends within ")
    assert "cut off" in text
