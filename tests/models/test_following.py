"""A model that keeps what it has read says what it would say of each whole text, whatever it is."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.types import Sampling
from limbeck.models import writing
from limbeck.models.following import Follower
from limbeck.models.writing import Draft, write

SIZES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


@pytest.fixture(params=SIZES, scope="module")
def transformer(request):
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **sizes, **SIZES[request.param])
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def whole(transformer, ids):
    """[v] what comes behind a text that is read in one go."""
    return transformer(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("short", [[5, 6, 7], [4, 5, 6, 7, 8, 9]], ids=["padded", "even"])
def test_with_what_it_keeps_and_padding_it_says_the_same(transformer, short):
    long = [9, 8, 7, 6, 5, 4]
    gap = len(long) - len(short)
    ids = torch.tensor([[0] * gap + short, long])
    follow = Follower(transformer, torch.tensor([[0] * gap + [1] * len(short), [1] * 6]))
    for more in ([], [11, 12], [13, 14], [15, 16], [17, 18]):
        if more:
            ids = torch.cat([ids, torch.tensor(more)[:, None]], 1)
        with torch.no_grad():
            heard = follow(ids)
        for row, skip in ((0, gap), (1, 0)):
            expected = whole(transformer, ids[row, skip:].tolist())
            torch.testing.assert_close(heard[row], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_prompt_that_stands_there_several_times_is_read_once(transformer):
    first, second = [4, 5, 6, 7], [7, 6, 5, 4]
    ids = torch.tensor([first, second, first, first])
    read: list[int] = []
    handle = transformer.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].numel())
    )
    follow = Follower(transformer, torch.ones_like(ids))
    heard = [follow(ids)]
    ids = torch.cat([ids, torch.tensor([[11], [12], [13], [14]])], 1)
    heard.append(follow(ids))
    handle.remove()
    assert read[0] == 2 * 4
    for width, logits in zip((4, 5), heard, strict=True):
        for row in range(4):
            expected = whole(transformer, ids[row, :width].tolist())
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_is_that_of_the_librarys_own_generation(transformer, tokenizer):
    drafts = [Draft(ids=[5, 6, 7, 8], seed=1), Draft(ids=[9, 8, 7, 6], seed=2)]
    found = write(transformer, tokenizer, drafts, Sampling(max_tokens=10), pad=0)
    theirs = transformer.generate(
        input_ids=torch.tensor([draft.ids for draft in drafts]),
        attention_mask=torch.ones(2, 4, dtype=torch.int64),
        max_new_tokens=10,
        do_sample=False,
    )[:, 4:].tolist()
    for one, line in zip(found, theirs, strict=True):
        assert list(one.ids) == line[: len(one.ids)]
        assert len(one.ids) == 10 or one.ids[-1] == 2


TABLES = {
    "gpt2": {"n_positions": 8},
    "opt": {"max_position_embeddings": 8, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "biogpt": {"max_position_embeddings": 8, "intermediate_size": 32},
    "gptj": {"n_positions": 8, "rotary_dim": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", TABLES)
def test_writing_ends_at_the_last_position_that_a_model_knows(kind, tokenizer, caplog):
    """Lines beside it go on, and a prompt that fills the table gets no answer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    # Its end is padding, too, which finished lines are filled with.
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **TABLES[kind], **ends)
    transformer = AutoModelForCausalLM.from_config(config).eval()
    transformer.get_output_embeddings().weight[[0, 2]] = 0  # it does not end on its own
    lines = ([5, 6], [5, 6, 7, 8, 9], [9] * 8, [9] * 12)
    writing._say_full.cache_clear()
    for _ in range(2):
        drafts = [Draft(ids=ids, seed=1) for ids in lines]
        found = write(transformer, tokenizer, drafts, Sampling(max_tokens=20), pad=0)
        assert [len(one.ids) for one in found] == [6, 3, 0, 0]
        assert not any(one.ended for one in found)
        assert found[2].text == found[3].text == ""
    assert [record.message for record in caplog.records] == [
        "behind prompts of 8 tokens or more the model has no position to write at"
    ]
    for draft, one in zip(drafts[:2], found[:2], strict=True):
        whole = transformer(torch.tensor([[*draft.ids, *one.ids]])).logits[0]
        expected = whole[len(draft.ids) - 1 : -1].argmax(-1)
        assert list(one.ids) == expected.tolist()
