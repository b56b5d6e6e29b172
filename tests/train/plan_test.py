import dataclasses
import json

import jax

from configs import tiny
from train.plan import collectives, flops_per_token, main, plan

HLO = """HloModule m

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gather = bf16[16,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %y)
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main.1 (p0: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%init), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%z), dimensions={0}
  %done = f32[16,4]{1,0} all-gather-done(%start)
  %both = (f32[2]{0}, f32[3]{0}) all-reduce(%u, %v), to_apply=%add.1
  %moved = (f32[2,4]{1,0}, f32[2,4]{1,0}) all-to-all(%w, %w2)
  ROOT %r = f32[8,4] copy(%q)
}
"""


def test_collectives_are_counted_through_loops():
    assert collectives(HLO) == {
        "all-gather": {"count": 4, "bytes": 3 * 16 * 4 * 2 + 16 * 4 * 4},
        "all-reduce": {"count": 1, "bytes": 20},
        "all-to-all": {"count": 1, "bytes": 64},
    }


def test_flops():
    model = dataclasses.replace(tiny.config.model, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    assert flops_per_token(1000, model, 64) == 6 * 1000 + 3 * 3 * 8 * 32 * 32
    assert flops_per_token(1000, dataclasses.replace(model, attention="softmax"), 64) == 6 * 1000 + 3 * 3 * 4 * 32 * 32


def test_plan_of_a_mesh():
    sizes = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    optimizer = dataclasses.replace(tiny.config.optimizer, newton_schulz_steps=1)
    mesh = dataclasses.replace(tiny.config.mesh, **sizes)
    config = dataclasses.replace(tiny.config, mesh=mesh, optimizer=optimizer)
    result = plan(config, "cpu")
    assert result["devices"] == 8 and result["parameters"] == 28_960
    assert result["flops"] == flops_per_token(28_960, config.model, 64) * 8 * 64
    assert result["batch_bytes"] == 3 * 2 * 64 * 4
    assert 8 * 28_960 / 4 < result["state_bytes"] < 12 * 28_960 / 2, "most of it is split over fsdp and tensor"
    assert result["collectives"].keys() >= {"all-gather", "all-reduce", "all-to-all"}


def test_command_prints_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the tests' own devices
    main(["tiny", "--target", "cpu", "--json", str(tmp_path / "plan.json")])
    text = capsys.readouterr().out
    assert text.startswith("tiny: 1 emulated CPU devices, 8 rows of 64") and "parameters        28,960" in text
    assert text.endswith("no collectives\n")
    assert json.loads((tmp_path / "plan.json").read_text())["parameters"] == 28_960
