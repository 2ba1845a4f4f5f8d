"""Memory savers: each against plain AdamW, and what each frees."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_runs import HERE, final_weights, log, options, train
from test_resume import SMALL, plant_nan, run_until_death
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.config import OptimConfig
from minisft.lean.adamw import LeanAdamW
from minisft.runs.lifecycle import main
from minisft.training import optimizer

BF16 = {"train__precision": "bf16", "optim__parameters": "bf16"}
IN_BACKWARD = {"optim__in_backward": "true", "optim__clip_norm": 0, "batch__micro_packs": 4}
ALL = {**BF16, **IN_BACKWARD, "optim__moments": "bf16", "parallel__offload": "optimizer"}


class Tied(nn.Module):
    """One matrix used twice, and a vector."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(30, 20, generator=generator).to(dtype))
        self.scale = nn.Parameter(torch.ones(20, dtype=dtype))

    def loss(self, number):
        x = torch.randn(7, 30, generator=torch.Generator().manual_seed(number)).to(self.table.dtype)
        return ((x @ self.table * self.scale) @ self.table.T).float().square().mean()


def lean(model, *, offload=False, **optim):
    return LeanAdamW(model, OptimConfig(**optim), offload=offload)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in a parameter, the last of them short."""
    monkeypatch.setattr(optimizer, "CPU_CHUNK", 512)


@pytest.mark.parametrize("saver", [{"in_backward": True}, {"offload": True}, {"in_backward": True, "offload": True}])
def test_in_fp32_the_update_is_that_of_torch(saver):
    """Where and when it is computed changes nothing: torch.optim.AdamW, to the last few bits."""
    ours, theirs = Tied(), Tied()
    saving = lean(ours, weight_decay=0.1, **saver)
    reference = torch.optim.AdamW([{"params": [theirs.table], "weight_decay": 0.1},
                                   {"params": [theirs.scale], "weight_decay": 0.0}], betas=(0.9, 0.95))
    for number in range(6):
        lr = 0.01 * (number + 1)
        saving.begin(lr, number)
        ours.loss(number).backward()
        theirs.loss(number).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(saving.clip(0), norm)
        saving.step()
    assert saving.steps() == 6
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def ordered(tensor):
    """bf16 numbers as integers in their order."""
    bits = tensor.view(torch.int16).numpy().astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("saver", [{}, {"in_backward": True, "offload": True}])
def test_in_bf16_it_is_computed_in_fp32_and_rounded_once(parameters, moments, saver):
    """What is stored is a neighbour of fp32 AdamW's result from the same state, and on average the result itself."""
    model = Tied(parameters)
    saving = lean(model, weight_decay=0.1, moments=moments, **saver)
    differences = {}  # away from zero, in distances between neighbours
    for number in range(5):
        before = Tied()
        reference = torch.optim.AdamW([{"params": [before.table], "weight_decay": 0.1},
                                       {"params": [before.scale], "weight_decay": 0.0}], lr=0.003, betas=(0.9, 0.95))
        with torch.no_grad():
            for name, parameter in before.named_parameters():
                parameter.copy_(model.get_parameter(name))
                reference.state[parameter] = {
                    "step": torch.tensor(float(number)),
                    **{moment: saving.moments(moment)[name].float().clone() for moment in ("exp_avg", "exp_avg_sq")}}
        twin = Tied(parameters)
        twin.load_state_dict(model.state_dict())
        twin.loss(number).backward()
        for name, parameter in before.named_parameters():
            parameter.grad = twin.get_parameter(name).grad.float()
        reference.step()

        saving.begin(0.003, number)
        model.loss(number).backward()
        saving.clip(0)
        saving.step()
        for name, parameter in before.named_parameters():
            pairs = {"parameter": (model.get_parameter(name).detach(), parameter.detach())}
            pairs |= {m: (saving.moments(m)[name], reference.state[parameter][m]) for m in ("exp_avg", "exp_avg_sq")}
            for kind, (stored, exact) in pairs.items():
                if stored.dtype == torch.float32:
                    torch.testing.assert_close(stored, exact, rtol=1e-5, atol=1e-8)
                else:
                    down = ordered((exact.view(torch.int32) & -0x10000).view(torch.float32).bfloat16())
                    assert (np.abs(ordered(stored) - down) <= 1).all()
                    distance = torch.finfo(torch.bfloat16).eps * 2.0 ** exact.abs().log2().floor()
                    away = (stored.float() - exact) * exact.sign() / distance
                    differences.setdefault(kind, []).append(away.flatten())
    for found in map(torch.cat, differences.values()):
        assert abs(float(found.mean())) < 5 * 0.5 / len(found) ** 0.5
        assert 0.3 < float(found.std()) < 0.5  # uniform between neighbours: sqrt(1/6); to the nearest: sqrt(1/12)


def test_a_slow_second_moment_does_not_stall():
    """beta2 = 0.999 shrinks a moment by less than bf16 can tell; on average it still shrinks as it should."""
    parameter = nn.Module()
    parameter.w = nn.Parameter(torch.zeros(5_000))
    saving = lean(parameter, betas=(0.9, 0.999), moments="bf16")
    for number in range(301):
        parameter.w.grad = torch.full((5_000,), 1.0 if number == 0 else 0.0)
        saving.begin(0.0, number)
        saving.clip(0)
        saving.step()
    assert float(saving.moments("exp_avg_sq")["w"].double().mean()) == pytest.approx(1e-3 * 0.999**300, rel=0.01)


def test_gradients_are_freed_on_the_way():
    """In the backward pass of four matrices, never are two gradients there at once."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    saving = lean(model, in_backward=True)
    saving.begin(0.1, 0)
    model(torch.randn(3, 8)).sum().backward()
    assert alive == [1, 1, 1, 1]
    assert all(p.grad is None for p in model.parameters())


def test_in_backward_what_is_not_finite_stays_out():
    model = Tied()
    saving, before = lean(model, in_backward=True), {k: v.clone() for k, v in model.state_dict().items()}
    saving.begin(0.1, 0)
    model.table.register_hook(lambda grad: grad * float("nan"))
    model.loss(0).backward()
    assert saving.clip(0).isnan()
    saving.step()
    assert torch.equal(model.table, before["table"])
    assert not saving.moments("exp_avg")["table"].any()
    assert not torch.equal(model.scale, before["scale"])
    assert saving.steps() == 1


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    settings = {"batch__micro_packs": 4, "optim__clip_norm": 0, "train__max_steps": 7}
    return train(base, folder, **settings), final_weights(folder)


@pytest.mark.parametrize("change", [{"optim__in_backward": "true"}, {"parallel__offload": "optimizer"},
                                    pytest.param({"optim__in_backward": "true", "ranks": 2}, marks=pytest.mark.slow)])
def test_a_run_is_the_same_whenever_and_wherever_it_updates(base, tmp_path, plain, change):
    records = train(base, tmp_path, **{"batch__micro_packs": 4, "optim__clip_norm": 0, "train__max_steps": 7, **change})
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close([r[key] for r in records], [r[key] for r in plain[0]], rtol=1e-5, atol=1e-5)
    for name, weight in final_weights(tmp_path).items():
        torch.testing.assert_close(weight, plain[1][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("savers", [BF16, {"optim__moments": "bf16"}, ALL], ids=["parameters", "moments", "all"])
def test_a_run_that_died_goes_on_bit_for_bit(base, tmp_path, monkeypatch, savers):
    settings = {**SMALL, "train__max_steps": 5, **savers}
    each = 1 if "batch__micro_packs" in savers else 4
    whole = train(base, tmp_path / "whole", **settings), final_weights(tmp_path / "whole")
    run_until_death(monkeypatch, options(base, tmp_path / "died", **settings), step=4, micro_batches=each)
    train(base, tmp_path / "died", **settings)
    assert [r["loss"] for r in log(tmp_path / "died")] == [r["loss"] for r in whole[0]]
    assert all(torch.equal(weight, whole[1][name]) for name, weight in final_weights(tmp_path / "died").items())


@pytest.mark.slow
def test_two_ranks_round_as_one(base, tmp_path):
    """The bits are those of the element in the whole parameter, so rounding differs only where the gradients do."""
    settings = {**ALL, "train__max_steps": 4, "data__eval": tmp_path / "eval.jsonl"}
    (tmp_path / "eval.jsonl").write_text((HERE / "oracles/conversations.jsonl").read_text())
    one, two = train(base, tmp_path / "1", **settings), train(base, tmp_path / "2", ranks=2, **settings)
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=2e-3)
    assert log(tmp_path / "2", "eval")[-1]["loss"] == pytest.approx(log(tmp_path / "1", "eval")[-1]["loss"], rel=2e-3)
    a, b = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    same = sum(int((a[name] == b[name]).sum()) for name in a) / sum(w.numel() for w in a.values())
    assert same > 0.9


@pytest.mark.parametrize("saver", [{}, {"offload": True}])
def test_opening_it_gathers_nothing(saver):
    """Which elements a rank holds is known on the rank; a gathered matrix of an 8B would be 2 GB."""
    model = nn.Linear(8, 8)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        with CommDebugMode() as sent:
            saving = LeanAdamW(model, OptimConfig(moments="bf16"), mesh["shard"], **saver)
        assert sent.get_total_counts() == 0
        assert saving._first == {"weight": 2 * 8, "bias": 2}  # the second of four ranks, two rows each
    finally:
        dist.destroy_process_group()


def test_bf16_parameters_follow_fp32_masters(base, tmp_path, plain):
    records = train(base, tmp_path, **{**ALL, "train__max_steps": 7})
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in plain[0]], rel=2e-2)
    assert all(weight.dtype == torch.bfloat16 for weight in final_weights(tmp_path).values())


@pytest.mark.parametrize(("change", "message"), [
    ({"optim__parameters": "bf16"}, "bf16 parameters need bf16 compute; set train.precision to bf16"),
    ({"optim__in_backward": "true"}, "set optim.clip_norm to 0"),
    ({"optim__in_backward": "true", "optim__clip_norm": 0},
     "batch.packs = 4 is more than batch.micro_packs = 1 on 1 rank, but"),
])
def test_what_cannot_be_is_refused(base, tmp_path, capsys, change, message):
    assert main(options(base, tmp_path, **change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_changed_precision_of_the_state_is_refused(base, tmp_path, monkeypatch, capsys):
    run_until_death(monkeypatch, options(base, tmp_path, **SMALL), step=4)
    assert main(options(base, tmp_path, **SMALL, optim__moments="bf16")) == 2
    assert "optim.moments: was 'fp32', is 'bf16'" in capsys.readouterr().err


def test_a_step_that_is_not_finite_in_backward_is_said_as_it_is(base, tmp_path, monkeypatch, capsys):
    plant_nan(monkeypatch, {2}, micro_batches=1)
    records = train(base, tmp_path, train__max_steps=3, **{**IN_BACKWARD, "batch__packs": 4})
    assert records[1]["skipped"]
    assert np.isfinite(records[2]["loss"])
    assert "parameters whose gradient is not finite stay as they are, the others are" in capsys.readouterr().out


class Streams:
    """Stands for torch.cuda: streams whose work has no order but the one that they wait for.

    Each stream has a vector clock; each piece of memory remembers who wrote and read it, and when.
    """

    def __init__(self):
        self.names, self.now = ["default"], 0
        self.clocks = {"default": {"default": 0}}
        self.active = "default"
        outer = self

        class Stream:
            def __init__(self, name=None):
                self.name = name or f"stream {len(outer.names)}"
                outer.names.append(self.name)
                outer.clocks.setdefault(self.name, {})

            def wait_stream(self, other):
                outer.join(self.name, outer.clocks[other.name])

            def wait_event(self, event):
                outer.join(self.name, event.clock)

        class Event:
            def __init__(self):
                self.clock = {}

            def record(self, stream):
                self.clock = dict(outer.clocks[stream.name])

            def synchronize(self):
                pass

        self.Stream, self.Event = Stream, Event
        self.default = Stream("default")

    def join(self, name, clock):
        mine = self.clocks[name]
        for other, time in clock.items():
            mine[other] = max(mine.get(other, 0), time)

    def current_stream(self):
        return self.default

    def stream(self, stream):
        outer = self

        class Switch:
            def __enter__(self):
                self.before, outer.active = outer.active, stream.name

            def __exit__(self, *_):
                outer.active = self.before

        return Switch()


class Races(TorchDispatchMode):
    """Finds accesses to the same memory from two streams, one of them a write, without an order between them."""

    def __init__(self, streams, memory):
        super().__init__()
        self.streams, self.memory, self.found, self.checked = streams, memory, [], 0
        self.last = {}

    def touch(self, tensor, writes):
        if tensor.untyped_storage().data_ptr() not in self.memory:
            return
        name, clock = self.streams.active, self.streams.clocks[self.streams.active]
        clock[name] = clock.get(name, 0) + 1
        first = tensor.data_ptr()
        for place in range(first, first + tensor.nbytes, 64):
            for other, (time, wrote) in self.last.setdefault(place, {}).items():
                self.checked += other != name
                if other != name and (writes or wrote) and clock.get(other, 0) < time:
                    self.found.append((other, name, hex(place)))
            wrote = writes or self.last[place].get(name, (0, False))[1]
            self.last[place][name] = (clock[name], wrote)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        changes = func.__name__.split(".")[0].endswith("_")
        for index, tensor in enumerate(() if func.is_view else tensors):
            self.touch(tensor, changes and (index == 0 or "adamw" in func.__name__))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("forgotten", ["nothing", "the store before", "the fetch", "the compute", "the step before"])
def test_no_two_streams_race_for_the_moments(monkeypatch, moments, forgotten):
    """Every access is ordered after those it depends on; and without any one of the waits the test sees a race.

    In a model of one chunk, the chunk is in another slot in every step.
    """
    monkeypatch.setattr(optimizer, "CPU_CHUNK", 64)
    found, checked = [], 0
    for model in (Tied(), nn.Linear(4, 4, bias=False)):
        streams = Streams()
        monkeypatch.setattr(torch, "get_device_module", lambda device, streams=streams: streams)
        saving = lean(model, moments=moments, offload=True)
        visits = saving._host
        where, what = {"nothing": (None, ""), "the store before": (visits._fetching, "wait_event"),
                       "the fetch": (streams.default, "wait_stream"), "the compute": (visits._storing, "wait_stream"),
                       "the step before": (visits, "begin")}[forgotten]
        if where:
            monkeypatch.setattr(where, what, lambda *_: None)
        kept = [t for moment in optimizer.MOMENTS for t in saving.moments(moment).values()]
        with Races(streams, {t.untyped_storage().data_ptr() for t in (*kept, visits._slots)}) as races:
            for number in range(3):
                saving.begin(0.01, number)
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                saving.clip(0)
                saving.step()
        found, checked = found + races.found, checked + races.checked
    assert checked > 100
    assert bool(found) == (forgotten != "nothing"), found[:3]
