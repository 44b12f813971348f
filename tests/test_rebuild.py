"""What is not kept for the backward pass is had again bit for bit: less memory, the same training."""

import copy

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import METHODS, BinaryConv2d, binarize_, binary_modules, set_progress, set_widths
from cyclebnn_dist.binary.rebuild import Rebuild, keep_less_, offer, offered, saving_instead, through
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.models.memory import Ledger, activation_bytes
from cyclebnn_dist.timm_import import timm

FAMILIES = {
    "resnet18": {},
    "resnet18 rprelu": {"activation": "rprelu", "shortcut": "convolution"},
    "resnet18 maxout": {"activation": "maxout"},
    "resnet18 prelu": {"activation": "prelu"},
    "regnetx_002": {},
    "efficientnet_b0": {"exclude": ("blocks.[3-6].*",)},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"method": "bireal"},
    "densenet121": {"exclude": ("features.denseblock[2-4].*",)},
}


def build(name, *, size=32, keep="recompute", **rules):
    torch.manual_seed(0)
    rules = {**FAMILIES.get(name, {}), **rules}
    kwargs = {"img_size": size, "depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name.split()[0], num_classes=10, **kwargs)
    binarize_(model, BinaryConfig(recompute=keep == "recompute", **rules), input_size=(3, size, size))
    if keep == "nothing":
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for _, layer in binary_modules(model):
            layer.keep = "nothing"
    set_widths(model, forward_bits=4, backward_bits=6, step=3)
    return model


def one_step(model, *, size=32):
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.tensor([1, 2, 3, 0])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | dict(
        model.named_buffers()
    )


@pytest.mark.parametrize("keep", ["integers", "recompute"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_statistics_are_the_same_bits(name, keep):
    expected = one_step(build(name, keep="nothing"))
    found = one_step(build(name, keep=keep))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert (value is None and found[key] is None) or torch.equal(value, found[key]), key


@pytest.mark.parametrize("keep", ["integers", "recompute"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_the_same_gradients(method, keep):
    def gradients(keep):
        model = build("resnet18", method=method, keep=keep)
        set_progress(model, 0.1)
        return one_step(model)

    for (name, value), again in zip(gradients("nothing").items(), gradients(keep).values(), strict=True):
        assert torch.equal(value, again), name


@pytest.mark.parametrize("keep", ["integers", "recompute"])
@pytest.mark.parametrize("method", ["adabin", "reactnet"])
def test_real_weights_of_a_first_phase_have_the_same_gradients(method, keep):
    def gradients(keep):
        model = build("resnet18", method=method, keep=keep)
        set_progress(model, 0.0, real_weights=True)
        return one_step(model)

    for (name, value), again in zip(gradients("nothing").items(), gradients(keep).values(), strict=True):
        assert torch.equal(value, again), name


def test_accumulation_and_a_second_backward_pass_see_the_same_tensors():
    def gradients(keep):
        model = build("resnet18", keep=keep)
        logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        logits.sum().backward(retain_graph=True)
        logits.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients("nothing"), gradients("recompute")))


def test_checkpointed_blocks_still_train_alike():
    def gradients(keep):
        model = build("resnet18", keep=keep)
        model.set_grad_checkpointing()
        return one_step(model)

    expected, found = gradients("nothing"), gradients("recompute")
    assert all(torch.equal(expected[key], found[key]) for key in expected if key.endswith("weight"))


def test_a_copied_model_rebuilds_its_own_tensors():
    model = build("resnet18")
    average = copy.deepcopy(model)
    expected = one_step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = one_step(average)
    assert all(torch.equal(expected[key], found[key]) for key in expected if key.endswith("conv2.weight"))


BOX = ["bnn", "xnor", "bnext"]


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224)


@pytest.fixture(scope="module")
def real_bytes(images):
    return activation_bytes(timm.create_model("resnet18"), images)


@pytest.mark.parametrize("method", BOX)
def test_box_gradients_keep_less_than_three_quarters_of_the_real_model(method, images, real_bytes):
    model = timm.create_model("resnet18")
    binarize_(model, BinaryConfig(method=method), input_size=(3, 64, 64))
    assert activation_bytes(model, images) <= 0.75 * real_bytes


@pytest.mark.parametrize("method", ["cyclebnn", "reactnet", "adabin", *BOX])
def test_recomputation_keeps_less_than_half_of_the_real_model(method, images, real_bytes):
    model = timm.create_model("resnet18")
    binarize_(model, BinaryConfig(method=method, recompute=True), input_size=(3, 64, 64))
    set_widths(model, forward_bits=4, backward_bits=8)
    assert activation_bytes(model, images) <= 0.5 * real_bytes


def test_weights_that_are_not_signs_yet_are_not_kept_either(images):
    model = timm.create_model("resnet18")
    binarize_(model, BinaryConfig(method="bnext", recompute=True), input_size=(3, 64, 64))
    hard = activation_bytes(model, images)
    set_progress(model, 0.1)
    assert activation_bytes(model, images) <= 1.01 * hard


def test_memory_counted_is_what_autograd_holds():
    """conv keeps its input (the images are not counted), tanh its result, which linear shares."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 36, 7))
    images = torch.randn(4, 3, 8, 8)
    assert activation_bytes(model, images) == 4 * 4 * 5 * 36
    batch_norm = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    assert activation_bytes(batch_norm, images) == 4 * 4 * 3 * 64 + 4 * (4 * 3)


def test_an_offer_ends_when_the_tensor_is_modified():
    x = torch.ones(3)
    offer(x, Rebuild(lambda: torch.ones(3)))
    assert offered(x) is not None
    x.add_(1.0)
    assert offered(x) is None


def test_a_tensor_modified_before_it_is_saved_is_saved_as_it_is():
    x = torch.rand(3, requires_grad=True) * 1.0
    with saving_instead(x, Rebuild(lambda: torch.full((3,), torch.nan))):
        x.add_(2.0)
        y = x * x
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, 2 * x)


def test_what_is_rebuilt_is_made_once_and_let_go_when_all_have_had_it():
    made = []

    def make():
        made.append(torch.full((4,), 2.0))
        return made[-1]

    leaf = torch.full((4,), 2.0, requires_grad=True)
    x = leaf * 1.0
    rebuild = Rebuild(make)
    offer(x, rebuild)
    y = through(lambda t: t * t + t.exp(), x)
    assert not made
    assert offered(y) is not None
    y.sum().backward()
    assert len(made) == 1
    assert rebuild._value is None
    torch.testing.assert_close(leaf.grad, torch.full((4,), 4.0 + torch.tensor(2.0).exp().item()))


def test_only_what_would_keep_the_product_makes_it_kept_as_integers():
    """Integers beside a product that someone keeps anyway would be more memory, not less."""
    plain, followed = (BinaryConv2d.from_real(nn.Conv2d(3, 4, 3, bias=False), method="bnn") for _ in range(2))
    model = nn.Sequential(followed, nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), plain)
    keep_less_(model, recompute=False, input_size=(3, 8, 8))
    assert (followed.keep, plain.keep) == ("integers", "nothing")


def chain(*, method="bireal", keep="recompute"):
    """real convolution, then twice normalization, PReLU and binary convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    for _ in range(2):
        binary = BinaryConv2d.from_real(nn.Conv2d(6, 6, 3), method=method)
        model.extend([nn.BatchNorm2d(6), nn.PReLU(), binary])
    model.append(nn.BatchNorm2d(6))
    if keep != "nothing":
        keep_less_(model, recompute=keep == "recompute", input_size=(3, 12, 12))
    return model


def gradients_of(model, logits):
    loss = logits.mul(torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    return torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_at_the_forward_pass_counts(training):
    """Evaluation between a forward and its backward pass is common; so are frozen normalizations."""
    images, found = torch.randn(4, 3, 12, 12), []
    for keep in ("nothing", "recompute"):
        model = chain(keep=keep).train(training)
        logits = model(images)
        model.train(not training)
        found.append(gradients_of(model, logits))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("keep", ["integers", "recompute"])
@pytest.mark.parametrize("key", ["1.weight", "2.weight", "4.bias"])
def test_parameters_changed_before_the_backward_pass_are_refused_as_ever(key, keep):
    model = chain(keep=keep)
    logits = model(torch.randn(4, 3, 12, 12))
    with torch.no_grad():
        model.get_parameter(key).add_(1.0)
    if key == "4.bias" and keep == "integers":
        gradients_of(model, logits)  # no gradient hangs on it
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_of(model, logits)


def test_latent_weights_changed_before_the_backward_pass_are_refused():
    layer = BinaryConv2d.from_real(nn.Conv2d(4, 4, 3), method="bnext")
    set_progress(layer, 0.01)
    output = layer(torch.randn(2, 4, 5, 5, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["prelu", "rprelu", "hardtanh"])
def test_what_is_rebuilt_is_what_autocast_made(activation, dtype):
    def gradients(keep):
        model = build("resnet18", keep=keep, activation=activation)
        with torch.autocast("cpu", dtype=dtype):
            logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        logits.float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients("nothing")
    for keep in ("integers", "recompute"):
        assert all(map(torch.equal, expected, gradients(keep)))


@pytest.mark.parametrize("keep", ["integers", "recompute"])
def test_all_that_is_kept_goes_with_the_backward_pass(keep):
    """A loss that is still held, as in a loop that accumulates, must not hold the activations of its step."""
    model = build("resnet18", keep=keep)
    one_step(model)
    with Ledger() as ledger:
        loss = model(torch.randn(4, 3, 32, 32)).square().sum()
        loss.backward()
        own = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
        held = ledger.held_bytes(besides={tensor.untyped_storage().data_ptr() for tensor in own})
    assert held == loss.element_size()


def test_inference_mode_works():
    model = build("resnet18").eval()
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 32, 32))
    with torch.inference_mode():
        assert torch.equal(model(torch.ones(1, 3, 32, 32)), expected)


def test_modules_may_be_called_by_name():
    model = chain()
    images = torch.randn(2, 3, 12, 12)
    first = model[0](images)
    norm, activation, binary = model[1], model[2], model[3]
    assert torch.equal(binary(input=activation(input=norm(input=first))), binary(activation(norm(first))))
