"""Any torch model, with any loss: rows against one backward pass per example."""

import pytest
import torch
from conftest import project, relative_error
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from trackstar import GradientCollector, SketchSpec

TOLERANCE = 2e-4


class Classifier(nn.Module):
    """An MLP on vectors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, 16),
            nn.LayerNorm(16),
            nn.ReLU(),
            nn.Linear(16, 12),
            nn.BatchNorm1d(12),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.layers(x)


class Attention(nn.Module):
    """As in timm: one fused product for query, key and value."""

    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, 2), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer: patches by convolution, a learned class token and positions, a linear head."""

    def __init__(self, layer, width=12):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(layer(width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def torch_layer(width):
    return nn.TransformerEncoderLayer(width, 2, 24, dropout=0.0, batch_first=True, norm_first=True)


class TorchEncoder(nn.Module):
    """torch's own encoder, whose layers take the tokens first and the batch second."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0)
        self.embed = nn.Linear(6, 12)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).transpose(0, 1)).mean(0))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention over another sequence of another width: three matrices rather than one."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        out, _ = self.attention(self.queries(x[:, :2]), x, x)
        return self.head(out.mean(1))


def rows_one_by_one(model, inputs, labels, spec):
    parameters = dict(model.named_parameters())
    block_of = spec.block_of(model)
    rows = torch.zeros(len(inputs), max(block_of.values()) + 1, spec.block_size, dtype=torch.float64)
    for i in range(len(inputs)):
        model.zero_grad()
        functional.cross_entropy(model(inputs[i : i + 1]), labels[i : i + 1]).backward()
        for name, weight in spec.weights(model).items():
            gradient = weight.view(parameters[weight.parameter].grad).double()
            rows[i, block_of[name]] += project(spec, weight, gradient).flatten()
    model.zero_grad()
    return rows


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randint(0, 3, shape[:1], generator=generator)


VECTORS, IMAGES, SEQUENCES = (5, 10), (4, 3, 8, 8), (4, 7, 6)

MODELS = {
    "MLP": (Classifier, VECTORS, {}),
    "MLP, everything": (Classifier, VECTORS, {"also": ["biases", "norms"]}),
    "ViT": (lambda: ViT(Layer), IMAGES, {}),
    "ViT, everything": (lambda: ViT(Layer), IMAGES, {"also": ["biases", "norms"]}),
    "ViT, heads": (lambda: ViT(Layer), IMAGES, {"split": {"*.qkv": 6}}),
    "ViT of torch's layers": (lambda: ViT(torch_layer), IMAGES, {"also": ["biases"]}),
    "torch's encoder": (
        TorchEncoder,
        SEQUENCES,
        {"modules": ["*.self_attn.in_proj_weight", "embed", "head"]},
    ),
    "cross-attention": (CrossAttention, SEQUENCES, {}),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_equal_explicit_backward_passes(name, frozen):
    make, shape, fields = MODELS[name]
    torch.manual_seed(0)
    model, spec = make().eval(), SketchSpec(sketch=3, **fields)
    inputs, labels = draw(*shape)
    wanted = rows_one_by_one(model, inputs, labels, spec)
    model.requires_grad_(not frozen)
    with GradientCollector(model, spec) as collector:
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE


def test_attention_is_captured_by_default():
    names = list(SketchSpec().block_of(ViT(torch_layer)))
    assert names[:3] == [
        f"blocks.0.{which}" for which in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1")
    ]


def test_following_leaves_gradients_and_results_as_they_are():
    torch.manual_seed(0)
    model, (inputs, labels) = ViT(torch_layer).train(), draw(*IMAGES)
    plain = model(inputs)
    functional.cross_entropy(plain, labels).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with GradientCollector(model, SketchSpec(sketch=3, also=["biases", "norms"])):
        seen = model(inputs)
        functional.cross_entropy(seen, labels).backward()
    assert torch.equal(plain, seen)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, wanted[name]), name


def test_layers_that_are_run_again_in_the_backward_pass():
    torch.manual_seed(0)
    model, spec, (inputs, labels) = ViT(torch_layer), SketchSpec(sketch=3), draw(*IMAGES)
    wanted = rows_one_by_one(model, inputs, labels, spec)
    run = model.blocks.forward
    model.blocks.forward = lambda x: checkpoint(run, x, use_reentrant=False)
    with GradientCollector(model, spec) as collector:
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE


class Scaled(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Module):
    """A matrix kept as a parameter, multiplied from either side."""

    def __init__(self, side):
        super().__init__()
        self.matrix, self.side = nn.Parameter(torch.randn(10, 10)), side
        self.layer = Scaled(10, 3)

    def forward(self, x):
        y = {"right": x @ self.matrix, "transposed": x @ self.matrix.T, "left": (self.matrix @ x.T).T}[
            self.side
        ]
        return self.layer(y.tanh())


@pytest.mark.parametrize("side", ["right", "transposed"])
def test_matrices_of_a_modules_own_code(side):
    torch.manual_seed(0)
    model, spec, (inputs, labels) = (
        Own(side),
        SketchSpec(sketch=3, modules=["matrix", "layer"]),
        draw(*VECTORS),
    )
    wanted = rows_one_by_one(model, inputs, labels, spec)
    with GradientCollector(model, spec) as collector:
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE
