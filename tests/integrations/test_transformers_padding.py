"""MPNet's encoder and the encoders of T5, mT5 and UMT5 leave out padding behind the tokens on a CPU."""

import pytest
import torch
import transformers_cases as cases
import transformers_models as models
from transformers_cases import Case, transformers
from transformers_models import EVERY_TYPE

from triton_offset_bias.integrations.transformers import enable_offset_bias

LENGTH, WIDTH = 37, 16
LENGTHS = [(37, 20, 1), (36, 37, 0), (5, 1, 1)]
SEQ2SEQ = ["t5", "mt5", "umt5"]


def _mask(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def _batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"input_ids": cases.tokens(len(lengths), LENGTH, 0), "attention_mask": _mask(lengths).long()}


def _case(name: str, lengths: tuple[int, ...]) -> Case:
    """A model with labels. Tokens that are padding, and targets of a sequence without tokens, do not count."""
    batch, mask = _batch(lengths), _mask(lengths)
    if name == "mpnet":
        labels, counted = batch["input_ids"].where(mask, -100), mask
    else:
        counted = mask.any(1)[:, None].expand(-1, 21)
        labels = cases.tokens(len(lengths), 21, 1).where(counted, -100)
    return Case(name, EVERY_TYPE[name][0], lambda: {**batch, "labels": labels}, lambda: counted)


def _encoder(model: transformers.PreTrainedModel) -> torch.nn.Module:
    """The part of the model that makes states of its inputs."""
    return model.mpnet if isinstance(model, transformers.MPNetForMaskedLM) else model.encoder


def _layers(model: transformers.PreTrainedModel) -> torch.nn.ModuleList:
    return model.mpnet.encoder.layer if isinstance(model, transformers.MPNetForMaskedLM) else model.encoder.block


def _t5_and_its_copy() -> tuple[torch.nn.Module, torch.nn.Module]:
    """T5's encoder, and another one that attends here."""
    model = models.t5()
    return model.encoder, cases.enabled_copy(model).encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["mpnet", *SEQ2SEQ])
def test_an_encoder_computes_only_tokens_that_are_no_padding(name, lengths, dtype):
    """A sequence may have one token or none. Decoders attend to the encoder's states as before."""
    case = _case(name, lengths)
    cases.assert_equals_eager(case, dtype)
    fast, mask = cases.enabled_copy(case.build()), _mask(lengths)
    seen = []
    _layers(fast)[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    states = _encoder(fast)(**_batch(lengths)).last_hidden_state
    assert seen == [(1, sum(lengths), WIDTH)]
    assert not states[~mask].any()
    assert states[mask].all(-1).any()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    """Layers compute the packed tokens again for their gradients."""
    case = _case(name, LENGTHS[0])
    fast = cases.checkpointed(cases.enabled_copy(case.build()), use_reentrant)
    cases.assert_equals_eager(case, torch.float32, fast)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_generated_tokens_are_those_of_eager_attention(name, options):
    """The encoder runs once. The decoder attends to its states in every step."""
    cases.assert_generates_as_eager(_case(name, (30, 37, 12)), **options)


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_padding_before_the_tokens_keeps_the_places(name):
    """The first place, which MPNet pools, is not a token then."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    encoder = _encoder(cases.enabled_copy(EVERY_TYPE[name][0]()))
    states = encoder(cases.tokens(2, LENGTH, 0), mask).last_hidden_state
    assert states.any(-1).all()


@pytest.mark.parametrize("is_configured", [False, True], ids=["argument", "configuration"])
def test_the_states_of_all_layers_are_those_of_the_whole_batch(is_configured):
    """Nothing is packed where they are asked for."""
    own, fast = _t5_and_its_copy()
    options = {} if is_configured else {"output_hidden_states": True}
    for encoder in (own, fast):
        encoder.config.output_hidden_states = is_configured
    expected, got = (encoder(**_batch(LENGTHS[0]), **options).hidden_states for encoder in (own, fast))
    assert len(got) == 3
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_embeddings_are_packed_as_tokens_are():
    """Padding's embeddings get no gradient. The output may be a tuple."""
    own, fast = _t5_and_its_copy()
    mask = _mask(LENGTHS[0])
    results = []
    for encoder in (own, fast):
        embeddings = own.embed_tokens(_batch(LENGTHS[0])["input_ids"]).detach().requires_grad_()
        (states,) = encoder(inputs_embeds=embeddings, attention_mask=mask, return_dict=False)
        states[mask].square().sum().backward()
        results.append((states.detach(), embeddings.grad))
    (expected, expected_gradient), (got, gradient) = results
    assert not got[~mask].any()
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_whole", [True, False], ids=["encoder", "layers"])
def test_compiled_code_computes_the_same(is_whole):
    """A compiled encoder is not packed. Compiled layers take packed tokens, however many, in one graph."""
    own, fast = _t5_and_its_copy()
    for module in [fast] if is_whole else fast.block:
        module.compile(backend="eager", fullgraph=True)
    for lengths in LENGTHS:
        mask = _mask(lengths)
        with torch.no_grad():
            got, expected = (encoder(**_batch(lengths)).last_hidden_state for encoder in (fast, own))
        torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)
        assert got[~mask].any() == is_whole
    torch.compiler.reset()


def test_an_encoder_with_a_forward_of_its_own_is_not_packed():
    """It attends here all the same."""
    model = models.t5()
    stack = type(model.encoder)
    own = type("OwnStack", (stack,), {"forward": lambda self, *args, **kwargs: stack.forward(self, *args, **kwargs)})
    model.encoder.__class__ = own
    expected = model.encoder(**_batch(LENGTHS[0])).last_hidden_state
    enable_offset_bias(model)
    assert type(model.encoder) is own
    got = model.encoder(**_batch(LENGTHS[0])).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_changed_implementation_is_named_for_a_padded_batch_too():
    """The other implementation's masks are no bounds."""
    fast = _t5_and_its_copy()[1]
    fast.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="`attn_implementation` must stay"):
        fast(**_batch(LENGTHS[0]))
