"""Videos: what is read of files, which frames, in which patches, and that the engine computes what the model does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from opd.api import execute
from opd.context import Context
from opd.errors import DataError, ModelError
from opd.language.agreement import common_vocabulary
from opd.language.engines.base import Drawing
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.prompts.videos import Clip, is_video, read, source_of
from opd.recipe import parse_recipe
from opd.vision import videos as module
from opd.vision.engine import ImageTextModel, Pictures
from opd.vision.videos import Family, VideoSettings, clip_of, size_within
from tests import vlm
from tests.vlm import picture, tiny_vlm

av = pytest.importorskip("av")

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
CPU = torch.device("cpu")


def shades(count, height=32, width=48):
    """Frames each of one grey, brighter and brighter: which one is shown can be read off it."""
    levels = np.linspace(10, 240, count).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def written(path, frames, rate, codec="libx264", **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "4", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def all_frames(total, rate, size):
    return range(total), size


# Files.


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi"])
def test_h264_comes_back_frame_by_frame(name, tmp_path):
    frames = shades(20)
    path = written(tmp_path / name, frames, 10)
    for source in (path, path.read_bytes()):
        clip = read(source, 0, float("inf"), "row", all_frames)
        assert clip.frames.shape == frames.shape
        assert np.abs(clip.frames.astype(int) - frames).max() < 12
        assert clip.times == pytest.approx([i / 10 for i in range(20)], abs=1e-3)
        assert clip.rate == pytest.approx(10)


def test_a_part_is_cut_and_frames_get_their_size_as_they_are_decoded(tmp_path):
    path = written(tmp_path / "a.mp4", shades(40), 8)
    prompt = Prompt("a", {}, where="row 1", folder=tmp_path)
    value = {"video": "a.mp4", "start": 1.0, "end": 3.5}
    source, start, end = source_of(value, prompt, "video", 2**30)
    assert source == path
    seen = []

    def plan(total, rate, size):
        seen.append((total, rate, size))
        return [0, 10, 19], (16, 32)

    clip = read(source, start, end, "row 1", plan)
    assert seen == [(20, 8.0, (32, 48))]
    assert clip.frames.shape == (3, 16, 32, 3)
    assert clip.times == pytest.approx((0, 1.25, 2.375), abs=1e-3)
    assert np.abs(clip.frames.mean((1, 2, 3)) - shades(40)[[8, 18, 27], 0, 0, 0]).max() < 12
    held = {"video": {"frames": shades(40), "fps": 8}, "start": 1.0, "end": 3.5}
    same = read(*source_of(held, prompt, "video", 1), "row 1", plan)
    assert same.times == pytest.approx(clip.times)
    assert np.abs(same.frames.astype(int) - clip.frames).max() < 14


def test_videos_are_told_by_name_or_keys():
    for value in ("a.mp4", ["b.MKV", {"path": "c.webm"}], {"frames": 1, "fps": 2}, {"video": "a.mp4", "end": 3}):
        assert is_video(value)
    for value in ("a.png", "text", b"bytes", {"path": "a.png"}, [], None, {"role": "user", "video": "a"}):
        assert not is_video(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("https://host/a.mp4", "is an address"),
        ("none.mp4", r"no file .*none.mp4'; a relative path"),
        ("broken.mp4", "cannot be read"),
        ("playlist.mp4", "is no MP4, MOV, Matroska, WebM or AVI file"),
        ("large.mp4", "has 5000 bytes, more than 4000; raise videos.largest_file"),
        (3, "is of type int; give a file's path"),
        ({"frames": np.zeros((2, 8, 8, 3)), "fps": 2}, r"its frames are a float64 array .*uint8 \[F, H, W, 3\]"),
        ({"frames": shades(2)}, "its fps is None"),
        ({"video": "a.mp4", "start": 3, "end": 2}, "no part of it"),
        ({"video": {"frames": shades(2), "fps": 2}, "start": 9}, "no frame between its start and its end"),
    ],
)
def test_what_is_no_video_is_refused_in_a_line(value, words, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    (tmp_path / "large.mp4").write_bytes(bytes(5000))
    prompt = Prompt("a", {}, where="row 7", folder=tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        read(*source_of(value, prompt, "video", 4000), "row 7: the video in column 'video'", all_frames)
    assert str(caught.value).startswith("row 7: the video in column 'video'")
    assert "\n" not in str(caught.value)


# What families take, against their own processors.


def processor_of(family):
    return tiny_vlm(family, layers=1)[1]


@pytest.mark.parametrize(("total", "rate"), [(300, 30.0), (45, 29.97), (7, 24.0), (3, 30.0), (5000, 25.0), (1, 30.0)])
@pytest.mark.parametrize("fps", [2.0, 0.7])
def test_frames_are_those_that_the_familys_processor_samples(total, rate, fps):
    settings = VideoSettings(fps=fps, min_frames=4, max_frames=60)
    metadata = SimpleNamespace(total_num_frames=total, fps=rate)
    ours = Family.of(processor_of("qwen3_vl")).chosen(settings, total, rate)
    limits = SimpleNamespace(fps=None, num_frames=None, min_frames=4, max_frames=60, temporal_patch_size=2)
    theirs = Qwen3VLVideoProcessor.sample_frames(limits, metadata, fps=fps)
    assert list(ours) == theirs.tolist()


def test_frames_of_qwen2_5_begin_steps_of_equal_length_and_come_in_pairs():
    family, settings = Family.of(processor_of("qwen2_5_vl")), VideoSettings(fps=2, max_frames=60)
    assert list(family.chosen(settings, 300, 30.0)) == list(range(0, 300, 15))
    assert list(family.chosen(settings, 45, 29.97)) == [0, 11, 22, 33]
    assert list(family.chosen(settings, 7, 24.0)) == [0, 1, 3, 5]
    assert list(family.chosen(settings, 3, 24.0)) == [0, 1]
    assert list(family.chosen(settings, 1, 24.0)) == [0]
    assert len(family.chosen(settings, 5000, 25.0)) == 60


def test_sizes_are_those_of_the_familys_processor():
    for size in ((480, 640), (1080, 1920), (33, 47), (700, 64)):
        for most in (4 * 32 * 32, 100 * 32 * 32, 10**9):
            ours = size_within(size, 32, most)
            theirs = smart_resize(*size, factor=32, min_pixels=32 * 32, max_pixels=most)
            # Theirs lets a narrow band be longer than it may.
            assert ours == theirs or theirs[0] * theirs[1] > most
            assert ours[0] * ours[1] <= most
    # One token high and far too wide.
    assert size_within((10, 1900), 32, 8 * 32 * 32) == (32, 256)
    with pytest.raises(DataError, match="4000 x 10 pixels; models take no such band"):
        size_within((10, 4000), 32, 10**6)


def test_patches_and_times_are_those_of_the_familys_processor():
    family = Family.of(processor_of("qwen3_vl"))
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    indices = [0, 15, 30, 45, 60]
    clip = Clip(frames, tuple(i / 30 for i in indices), 2.0)
    rows, grid = family.patches(clip)
    assert grid.tolist() == [[3, 4, 6]]
    pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)[None]
    mean, std = (torch.tensor(v).view(1, 1, 3, 1, 1) for v in (family.mean, family.std))
    theirs, *sides = Qwen3VLVideoProcessor.patchify(None, (pixels - mean) / std, 8, 2, 2)
    assert sides == [3, 4, 6]
    torch.testing.assert_close(rows, theirs[0])
    assert family.times_of(clip) == pytest.approx(Qwen3VLProcessor._calculate_timestamps(None, indices, 30.0, 2))
    text = family.text(clip, grid)
    assert text.startswith("<0.2 seconds><|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|><1.2 seconds>")
    assert text.count("<|video_pad|>") == 18


def test_a_video_never_takes_more_tokens_than_it_may():
    family = Family.of(processor_of("qwen3_vl"))
    for frames, (height, width) in ((200, (1080, 1920)), (9, (200, 3000)), (768, (64, 64))):
        settings = VideoSettings(fps=30, max_frames=frames, max_tokens=500, frame_tokens=40)
        chosen, size = family.plan(settings, 10_000, 30.0, (height, width))
        tokens = -(-len(chosen) // 2) * size[0] * size[1] // 16**2
        assert tokens <= 500
        assert size[0] * size[1] // 16**2 <= 40
    with pytest.raises(DataError, match=r"384 steps of frames, and videos.max_tokens is 100"):
        family.plan(VideoSettings(fps=30, max_tokens=100), 10_000, 30.0, (64, 64))


def test_files_are_decoded_once_and_kept_on_the_disk_where_asked(tmp_path, monkeypatch):
    path = written(tmp_path / "a.mp4", shades(20), 10)
    family, calls = Family.of(processor_of("qwen3_vl")), []
    monkeypatch.setattr(module, "read", lambda *a: calls.append(1) or read(*a))
    prompt = Prompt("a", {}, where="row 1")
    settings = VideoSettings(fps=5, cache=str(tmp_path / "cache"))
    first = clip_of(str(path), prompt, "video", settings, family)
    assert clip_of(str(path), prompt, "video", settings, family) is first
    monkeypatch.setattr(module, "_CLIPS", type(module._CLIPS)())
    again = clip_of(str(path), prompt, "video", settings, family)
    assert len(calls) == 1
    assert np.array_equal(again.frames, first.frames)
    assert (again.times, again.rate) == (first.times, first.rate)
    # Other limits, and another file in its place, are other clips.
    assert len(clip_of(str(path), prompt, "video", VideoSettings(fps=2), family).frames) == 4
    written(path, shades(30), 10)
    assert len(clip_of(str(path), prompt, "video", settings, family).frames) == 15
    (stored,) = [p for p in (tmp_path / "cache").iterdir() if p.stat().st_size][:1]
    stored.write_bytes(b"damaged")
    monkeypatch.setattr(module, "_CLIPS", type(module._CLIPS)())
    clip_of(str(path), prompt, "video", settings, family)


# The engine.

CHARACTERS = vlm.CHARACTERS + "<>"
"""Times of Qwen3-VL are texts like `<1.2 seconds>`."""
PLAY = "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(params=FAMILIES)
def engine(request, monkeypatch):
    return engine_of(request.param, monkeypatch)


def engine_of(family, monkeypatch, seed=0):
    monkeypatch.setattr(vlm, "CHARACTERS", CHARACTERS)
    model, processor = tiny_vlm(family, seed)
    template = processor.chat_template.replace("{% else %}{{ part.text }}", PLAY + "{% else %}{{ part.text }}")
    assert PLAY in template
    processor.chat_template = template
    return ImageTextModel(model, processor, pictures=Pictures(videos=VideoSettings(fps=2)))


def noise(seed, count=6, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def prompts_with_videos():
    return [
        Prompt("a", {"prompt": "when?", "video": {"frames": noise(0), "fps": 2.0}}),
        Prompt("b", {"prompt": "when?", "video": {"frames": noise(1), "fps": 2.0}}),
        Prompt(
            "c",
            {
                "prompt": "<video> and <image>: which?",
                "video": {"frames": noise(2, 9), "fps": 2.0},
                "image": picture(3),
            },
        ),
        Prompt("d", {"prompt": "<video><video>?", "video": [{"frames": noise(i, 4), "fps": 2.0} for i in (3, 4)]}),
        Prompt("e", {"prompt": "text alone", "video": None}),
    ]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["auto", "right"])
def test_rows_with_videos_get_the_models_own_logits(engine, layout):
    contexts = [engine.encode(prompt) for prompt in prompts_with_videos()]
    generator = torch.Generator().manual_seed(5)
    completions = [torch.randint(3, 60, (2 + i % 3,), generator=generator) for i in range(len(contexts))]
    own = torch.cat([engine.own_logits(c, y) for c, y in zip(contexts, completions, strict=True)])
    ours = engine.head(1.0).logits(engine(contexts, completions, layout))
    torch.testing.assert_close(ours, own, atol=2e-4, rtol=1e-4)
    assert (own[: len(completions[0])] - engine.own_logits(contexts[1], completions[0])).abs().max() > 1e-2


@torch.no_grad()
def test_positions_and_greedy_answers_are_the_models_own(engine):
    context = engine.encode(prompts_with_videos()[0])
    given = {"input_ids": context.ids[None], **context.inputs}
    rope = {name: value for name, value in given.items() if not name.startswith("pixel")}
    positions, _ = engine.base.model.get_rope_index(**rope)
    reading = engine.read([context])
    assert torch.equal(reading.positions([len(context)])[0], positions[:, 0])
    if engine.base.config.model_type == "qwen2_5_vl":
        # Two frames a step at two a second: one second, which is that many rotary positions.
        assert context.inputs["second_per_grid_ts"].tolist() == [1.0]
        times = positions[0, 0][context.ids == engine.processor.video_token_id].unique()
        assert times.diff().tolist() == [engine.base.config.vision_config.tokens_per_second] * 2
    else:
        assert "second_per_grid_ts" not in context.inputs
        text = engine.tokenizer.decode(context.ids)
        assert [f"<{t} seconds>" in text for t in ("0.2", "1.2", "2.2")] == [True] * 3
        assert text.count("<|vision_start|>") == 3
    agreed = Context(CPU, agreed=Tokens(common_vocabulary([engine]), (engine.tokenizer.eos_token_id,)))
    drawn = engine.sample([context], 1, 6, [0], Drawing(agreed, top_k=1))[0]
    ids = engine.base.generate(
        **given,
        attention_mask=torch.ones_like(context.ids)[None],
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=list(engine.placeholders),
    )
    assert drawn.actions.tolist() == ids[0, len(context) :].tolist()[: len(drawn.actions)]
    assert not set(drawn.actions.tolist()) & set(engine.placeholders)


def test_rows_show_a_few_frames_with_their_times(engine):
    (clip,) = engine.clips(Prompt("a", {"prompt": "?", "video": {"frames": noise(0, 40), "fps": 2.0}}))
    assert len(clip["times"]) == len(clip["images"]) == 12
    assert clip["times"][0] == 0
    assert clip["times"][-1] == 19.5
    assert len(engine.clips(prompts_with_videos()[3])) == 2
    assert engine.probes()[0]["input_ids"].shape[0] == 1


def test_prompts_whose_videos_have_no_place_are_refused(engine, monkeypatch):
    two = Prompt("a", {"prompt": "<video>?", "video": [{"frames": noise(0), "fps": 2}] * 2}, where="row 1")
    with pytest.raises(DataError, match="places for 1 videos of column 'video', which holds 2"):
        engine.encode(two)
    with pytest.raises(
        DataError, match=r"no column 'video' with its videos \(did you mean 'vide0'\?\); name .*videos.column"
    ):
        engine.encode(Prompt("a", {"prompt": "?", "vide0": 1}, where="row 1"))
    engine.pictures = Pictures()
    messages = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(DataError, match=r"nothing says how the model reads videos; set student.videos"):
        engine.encode(Prompt("a", {"prompt": messages, "image": None}, where="row 1"))
    with pytest.raises(ModelError, match=r"videos are read by models with one of Qwen3VLProcessor.*Idefics3Processor"):
        Family.of(processor_of("idefics3"))


# A run.


def test_a_run_trains_on_videos_of_files_and_the_teacher_sees_the_same(tmp_path, monkeypatch):
    folders = []
    for name, seed in (("student", 0), ("teacher", 1)):
        made = engine_of("qwen3_vl", monkeypatch, seed)
        made.base.save_pretrained(tmp_path / name)
        made.save_reader(tmp_path / name)
        folders.append(str(tmp_path / name))
    rows = []
    for i in range(5):
        written(tmp_path / f"{i}.mp4", noise(i, 16, 32, 32), 8)
        rows.append({"prompt": f"when is {i}?", "video": f"{i}.mp4", "interval": [0.5, 1.5], "duration": 2.0})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    decoded = []
    monkeypatch.setattr(module, "read", lambda *a: decoded.append(a[0]) or read(*a))
    settings = {
        "output": str(tmp_path / "run"),
        "steps": 1,
        "student": {
            "kind": "image_text",
            "model": folders[0],
            "images": None,
            "videos": {"fps": 4},
            "vision": "frozen",
        },
        "teacher": {"kind": "image_text", "model": folders[1], "images": None},
        "prompts": {"kind": "file", "path": str(tmp_path / "rows.jsonl")},
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_sum",
        "verifier": "temporal_grounding",
        "rollout": {"max_new_tokens": 4},
        "batch": {"prompts": 2},
        "update": {"learning_rate": 1e-3},
        "evaluation": {"held_out": 2, "teacher_answers": True},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    result = execute(parse_recipe(settings), quiet=True)
    files = [source for source in decoded if not isinstance(source, dict)]
    assert len(files) == len(set(files)) == 5
    assert max(row["train/rollout_gap"] for row in result.history if "train/rollout_gap" in row) < 1e-3
    row = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert len(row["frames"]["times"]) == len(row["frames"]["images"]) == 8
    assert row["frames"]["times"][-1] == 1.88
    assert row["interval"]["true"] == [0.5, 1.5]
    assert "teacher" in row["interval"]
