"""EK-FAC written down from its definition: one backward pass per example, dense matrices, float64."""

import torch
from trackstar.ekfac.sampling import coins_of, draw
from trackstar.gradients.examples import IGNORED


def labels_of(example, logits=None, seed=0, index=0):
    """The example's labels by the position that predicts them, or those drawn from ``logits`` (T, V)."""
    wanted = torch.from_numpy(example.labels[1:]).long()
    if logits is None:
        return wanted
    drawn = draw(logits[:-1][wanted != IGNORED].softmax(1), coins_of(example, seed, index))
    return wanted.masked_scatter(wanted != IGNORED, drawn)


def token_gradients(model, modules, example, labels=None, biases=False):
    """{module: (x (n, I), δ (n, O))} float64 of the tokens that reach the example's loss, by autograd."""
    seen, hooks = {}, []

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[name] = inputs[0], output

        return hook

    for name, module in modules.items():
        hooks.append(module.register_forward_hook(keep(name)))
    logits = model(input_ids=torch.from_numpy(example.tokens).long()[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    labels = labels_of(example) if labels is None else labels
    torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").backward()
    model.zero_grad()
    n = int((labels != IGNORED).nonzero()[-1]) + 1
    found = {}
    for name, (x, y) in seen.items():
        x, delta = (t.detach().reshape(-1, t.shape[-1])[:n].double() for t in (x, y.grad))
        if biases and modules[name].bias is not None:
            x = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
        found[name] = x, delta
    return found


def drawn_gradients(model, modules, examples, seed=0, biases=False):
    """:func:`token_gradients` of every example, with labels drawn from the model."""
    found = []
    for index, example in enumerate(examples):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.tokens).long()[None], use_cache=False).logits[0]
        labels = labels_of(example, logits.float(), seed, index)
        found.append(token_gradients(model, modules, example, labels, biases))
    return found


def dense_curvature(gradients, name):
    """EK-FAC's G of a module, (O·I, O·I) float64, rows of a gradient one after another."""
    xs, deltas = (torch.cat([tokens[name][side] for tokens in gradients]) for side in (0, 1))
    by_input = torch.linalg.eigh(xs.T @ xs).eigenvectors
    by_output = torch.linalg.eigh(deltas.T @ deltas).eigenvectors
    basis = torch.kron(by_output, by_input)
    rotated = torch.stack([basis.T @ (d.T @ x).flatten() for x, d in (tokens[name] for tokens in gradients)])
    return basis @ torch.diag(rotated.square().mean(0)) @ basis.T


def dense_scores(curvatures, queries, examples, damping=0.1):
    """∇f_qᵀ (G + λI)⁻¹ ∇L_m of each module, (Q, N, L) float64, for :func:`token_gradients` of both."""
    scores = torch.zeros(len(queries), len(examples), len(curvatures), dtype=torch.float64)
    for layer, (name, curvature) in enumerate(curvatures.items()):
        by_query, by_example = (
            torch.stack([(d.T @ x).flatten() for x, d in (tokens[name] for tokens in side)])
            for side in (queries, examples)
        )
        damped = curvature + damping * curvature.diagonal().mean() * torch.eye(
            len(curvature), dtype=torch.float64
        )
        scores[:, :, layer] = by_query @ torch.linalg.solve(damped, by_example.T)
    return scores
