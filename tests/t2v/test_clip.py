"""The text tower from a checkpoint and from a folder: the same states, and those of the libraries that define them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2v.clip import text_config, text_weights, tokenizer_files
from t2v.config import TextConfig
from t2v.frozen import TextEncoder, load_text

PROMPTS = ["a red circle moves left", "a red circle moves right", ""]
HARD = ["Wow!!! 12 naïve cafés, it's ☃ 你好 ! done", "  two\n spaces ", "word " * 100, "<|endoftext|> !"]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small CLIP, written as open_clip's own training writes it."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    words = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": words}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(3)
    torch.save({"state_dict": open_clip.create_model("tiny-clip").state_dict()}, folder / "clip.pt")
    return folder / "clip.pt"


def published(weights: Path, **changes: object) -> TextEncoder:
    return load_text(TextConfig(weights=str(weights), architecture="tiny-clip", **changes))  # type: ignore[arg-type]


def reference(clip_file: Path, layers: int) -> CLIPTextModel:
    """transformers' model with the weights of the checkpoint's first layers, mapped here by other means."""
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=77, hidden_act="gelu", eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    state = torch.load(clip_file, weights_only=True)["state_dict"]
    renamed = _in_transformers_names({name: value for name, value in state.items() if not name.startswith("visual.")})
    beyond = tuple(f"encoder.layers.{layer}." for layer in range(layers, 3))
    unused = ("logit_scale", "text_projection", *beyond)
    model.load_state_dict({name: value for name, value in renamed.items() if not name.startswith(unused)}, strict=True)
    return model


def _in_transformers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        for theirs, ours in (
            ("positional_embedding", "embeddings.position_embedding.weight"),
            ("token_embedding", "embeddings.token_embedding"),
            ("transformer.resblocks", "encoder.layers"),
            ("ln_final", "final_layer_norm"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            name = name.replace(theirs, ours)
        if "attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            renamed[name] = value
    return renamed


@pytest.fixture
def released(clip_file: Path, tmp_path: Path) -> Path:
    """The same weights as released text-to-video models have them: text_encoder/ of the layers used, tokenizer/."""
    reference(clip_file, layers=2).save_pretrained(tmp_path / "released" / "text_encoder")
    (tmp_path / "released" / "tokenizer").mkdir()
    for name, content in tokenizer_files(published(clip_file)).items():
        (tmp_path / "released" / "tokenizer" / name).write_text(content)
    return tmp_path / "released"


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_checkpoint_equals_open_clip_cut_before_its_last_layer(clip_file: Path) -> None:
    clip = open_clip.create_model("tiny-clip", pretrained=str(clip_file))
    tokens = open_clip.tokenize(PROMPTS)
    clip.transformer.resblocks = clip.transformer.resblocks[:-1]
    with torch.no_grad():
        embedded = clip.token_embedding(tokens) + clip.positional_embedding
        expected = clip.ln_final(clip.transformer(embedded, attn_mask=clip.attn_mask))
    torch.testing.assert_close(published(clip_file).encode(PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_several_gpus_is_the_same(clip_file: Path, tmp_path: Path) -> None:
    state = torch.load(clip_file, weights_only=True)["state_dict"]
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "clip.pt")
    assert torch.equal(published(tmp_path / "clip.pt").encode(PROMPTS), published(clip_file).encode(PROMPTS))


@pytest.mark.parametrize("where", [".", "text_encoder"])
def test_a_released_folder_equals_the_checkpoint_and_transformers(clip_file: Path, released: Path, where: str) -> None:
    folder, file = published(released / where), published(clip_file)
    assert len(folder.blocks) == len(file.blocks) == 2
    tokens = file.tokenize(PROMPTS)
    assert torch.equal(folder.tokenize(PROMPTS), tokens)
    torch.testing.assert_close(folder(tokens), file(tokens), atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = reference(clip_file, layers=2)(tokens).last_hidden_state
    torch.testing.assert_close(folder(tokens), expected, atol=1e-5, rtol=0)


def test_a_folder_of_older_transformers_is_the_same(clip_file: Path, released: Path) -> None:
    state = {f"text_model.{name}": value for name, value in reference(clip_file, layers=2).state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    shutil.rmtree(released / "text_encoder")
    reference(clip_file, layers=2).config.save_pretrained(released / "text_encoder")
    torch.save(state, released / "text_encoder" / "pytorch_model.bin")
    CLIPTokenizer.from_pretrained(released / "tokenizer").save_pretrained(released / "newer")
    shutil.rmtree(released / "tokenizer")
    (released / "newer").rename(released / "tokenizer")  # while the tokenizer is the newest transformers'
    assert torch.equal(published(released).encode(PROMPTS), published(clip_file).encode(PROMPTS))


def test_a_folder_with_every_layer_loses_those_to_skip(clip_file: Path, released: Path) -> None:
    shutil.rmtree(released / "text_encoder")
    reference(clip_file, layers=3).save_pretrained(released / "text_encoder")
    assert len(published(released).blocks) == 2
    assert len(published(released, skip_layers=0).blocks) == 3
    torch.testing.assert_close(published(released).encode(PROMPTS), published(clip_file).encode(PROMPTS))


@pytest.mark.parametrize("width", [32, 48])
def test_what_is_written_is_read_by_transformers_and_by_us(clip_file: Path, tmp_path: Path, width: int) -> None:
    if width == 32:
        text = published(clip_file)
    else:
        text = load_text(TextConfig(weights="random", width=48, heads=4, layers=3, skip_layers=1, context=20))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(text_config(text)))
    torch.save(text_weights(text), tmp_path / "text_encoder" / "pytorch_model.bin")
    for name, content in tokenizer_files(text).items():
        (tmp_path / "tokenizer" / name).write_text(content)

    model, told = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    length = tokenizer.model_max_length
    assert (tokenizer.pad_token_id, length) == (0, 77 if width == 32 else 20)
    padded = tokenizer(PROMPTS + HARD, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert torch.equal(padded.input_ids[: len(PROMPTS)], text.tokenize(PROMPTS))
    assert torch.equal(padded.input_ids[len(PROMPTS) : -1], text.tokenize(HARD[:-1]))
    with torch.no_grad():
        theirs = model(padded.input_ids).last_hidden_state
    torch.testing.assert_close(text(padded.input_ids), theirs, atol=1e-5, rtol=0)
    assert torch.equal(published(tmp_path).encode(PROMPTS), text.encode(PROMPTS))


def test_a_tower_with_quick_gelu_stays_one(released: Path, clip_file: Path) -> None:
    rewrite(released / "text_encoder" / "config.json", lambda values: values.update(hidden_act="quick_gelu"))
    text = published(released)
    assert text_config(text)["hidden_act"] == "quick_gelu"
    model = CLIPTextModel.from_pretrained(released / "text_encoder").eval()
    with torch.no_grad():
        expected = model(text.tokenize(PROMPTS)).last_hidden_state
    torch.testing.assert_close(text.encode(PROMPTS), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, published(clip_file).encode(PROMPTS), atol=1e-5)


def test_misfits_name_the_config_key_the_path_and_the_tensors(clip_file: Path, released: Path, tmp_path: Path) -> None:
    state = torch.load(clip_file, weights_only=True)["state_dict"]
    state["ln_last.weight"] = state.pop("ln_final.weight")
    torch.save(state, tmp_path / "clip.pt")
    message = r"model.text.weights: .*clip.pt: ln_final\.weight is missing; ln_last\.weight is not in the model$"
    with pytest.raises(ValueError, match=message):
        published(tmp_path / "clip.pt")
    rewrite(released / "text_encoder" / "config.json", lambda values: values.update(num_hidden_layers=1))
    message = (
        r"model.text.weights: .*text_encoder: text_model\.encoder\.layers\.1\..* is not in the model; .*and 8 more$"
    )
    with pytest.raises(ValueError, match=message):
        published(released)
    with pytest.raises(ValueError, match="model.text.architecture 'ViT-X' is none of open_clip's"):
        load_text(TextConfig(weights=str(clip_file), architecture="ViT-X"))
    rewrite(released / "text_encoder" / "config.json", lambda values: values.pop("hidden_size"))
    with pytest.raises(ValueError, match="hidden_size missing, this is no CLIPTextModel"):
        published(released)
    (released / "text_encoder" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="model.text.weights: .*released has no config.json"):
        published(released)


def test_a_tokenizer_that_pads_or_spells_otherwise_is_refused(released: Path) -> None:
    settings = released / "tokenizer" / "tokenizer_config.json"
    rewrite(settings, lambda values: values.update(pad_token={"content": "<|endoftext|>"}))
    with pytest.raises(ValueError, match=r"tokenizer: pads with '<\|endoftext\|>', id 49407; .* id 0, '!'"):
        published(released)
    rewrite(settings, lambda values: values.update(pad_token="!"))
    rewrite(released / "tokenizer" / "vocab.json", lambda values: values.update(cat=1, dog=2))
    with pytest.raises(ValueError, match="its vocabulary is not CLIP's, the first differences are at .*cat, "):
        published(released)
    shutil.rmtree(released / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer has neither vocab.json nor tokenizer.json"):
        published(released)
