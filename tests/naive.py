"""ModGrad straight from the paper's equations: one task at a time, the whole network, M written out.

The slow oracle that the batched code in modgrad.py must equal. It shares nothing with it but the parameter tensors: the
generator's weights are read by name and multiplied out here.
"""

import torch
import torch.nn.functional as F


def conv4_logits(theta, x, maps=None):
    """x (N, 3, S, S) -> (N, ways); conv, batch norm with the batch's statistics, ReLU, max-pool, four times; linear.

    With a "context" in theta CAVIA's network, FiLM between the third block's pool and its ReLU; `maps` {layer: (out, out)} are
    T-Net's, right after the layers.
    """
    maps = maps or {}
    for k in range(1, 5):
        x = F.conv2d(x, theta[f"conv{k}.weight"], theta[f"conv{k}.bias"], padding=1)
        if f"conv{k}" in maps:
            x = F.conv2d(x, maps[f"conv{k}"][:, :, None, None])
        x = F.batch_norm(x, None, None, theta[f"norm{k}.weight"], theta[f"norm{k}.bias"], training=True)
        if k == 3 and "context" in theta:
            channels, film = x.shape[1], theta["film.weight"] @ theta["context"] + theta["film.bias"]
            x = F.relu(film[:channels, None, None] * F.max_pool2d(x, 2) + film[channels:, None, None])
        else:
            x = F.max_pool2d(F.relu(x), 2)
    x = F.linear(x.flatten(1), theta["head.weight"], theta["head.bias"])
    return x @ maps["head"].T if "head" in maps else x


def batch_normalised(theta, name, x):
    return F.batch_norm(x, None, None, theta[f"{name}.weight"], theta[f"{name}.bias"], training=True)


def resnet34_logits(theta, x):
    """He et al. 2016, Fig. 3 with batch norm after each convolution; x (N, 3, S, S) -> (N, ways)."""
    x = F.conv2d(x, theta["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(batch_normalised(theta, "bn1", x)), kernel_size=3, stride=2, padding=1)
    for group, blocks in enumerate([3, 4, 6, 3], start=1):
        for n in range(blocks):
            name = f"layer{group}.{n}"
            changes = group > 1 and n == 0
            y = F.conv2d(x, theta[f"{name}.conv1.weight"], stride=2 if changes else 1, padding=1)
            y = F.relu(batch_normalised(theta, f"{name}.bn1", y))
            y = batch_normalised(theta, f"{name}.bn2", F.conv2d(y, theta[f"{name}.conv2.weight"], padding=1))
            if changes:
                x = batch_normalised(theta, f"{name}.downsample.1", F.conv2d(x, theta[f"{name}.downsample.0.weight"], stride=2))
            x = F.relu(y + x)
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), theta["head.weight"], theta["head.bias"])


def wide_resnet28_logits(theta, x):
    """Zagoruyko and Komodakis 2016, Fig. 1 (c) and Table 1 for depth 28, with stride 2 in the first group too."""
    x = F.conv2d(x, theta["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for n in range(4):
            name = f"layer{group}.{n}"
            activated = F.relu(batch_normalised(theta, f"{name}.bn1", x))
            y = F.conv2d(activated, theta[f"{name}.conv1.weight"], stride=2 if n == 0 else 1, padding=1)
            y = F.conv2d(F.relu(batch_normalised(theta, f"{name}.bn2", y)), theta[f"{name}.conv2.weight"], padding=1)
            x = y + (F.conv2d(activated, theta[f"{name}.shortcut.weight"], stride=2) if n == 0 else x)
    x = F.relu(batch_normalised(theta, "bn", x))
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), theta["head.weight"], theta["head.bias"])


def mlp_output(theta, x):
    """x (N, in) -> (N, out) through fc1, ReLU, fc2, ..., without ReLU after the last."""
    layers = len(theta) // 2
    for k in range(1, layers + 1):
        x = F.linear(x, theta[f"fc{k}.weight"], theta[f"fc{k}.bias"])
        x = F.relu(x) if k < layers else x
    return x


def sister(psi, path, nu, u):
    """Eqs. 6-7 for one task: nu (D) -> h a, (n)."""
    hidden = F.relu(psi[f"{path}.inner.weight"] @ nu + psi[f"{path}.inner.bias"])
    out = psi[f"{path}.outer.weight"] @ hidden + psi[f"{path}.outer.bias"]
    a = torch.softmax(out[:u], 0)
    h = out[u:].reshape(u, -1).T                                     # (n, u)
    return h @ a


def modulation(psi, name, shape, nu, u):
    """Eq. 8 and the ReLU: M in the shape of the tensor it modulates."""
    key = name.replace(".", "/")
    col = sister(psi, f"cols.{key}", nu, u)
    if len(shape) == 1:
        return F.relu(col)
    return F.relu(torch.outer(sister(psi, f"rows.{key}", nu, u), col)).reshape(shape)


def step_once(loss, theta, g, psi, nu, alpha, u):
    """theta - alpha M(nu) ⊙ g on the tensors in g; without psi, M = 1."""
    m = {n: modulation(psi, n, theta[n].shape, nu, u) if psi else torch.ones_like(theta[n]) for n in g}
    return {**theta, **{n: theta[n] - alpha * m[n] * g[n] for n in g}}


def context(loss, theta, g, psi, nu, alpha, u, normalise=False):
    """Eq. 9; `normalise` divides by the root mean square."""
    nu = -torch.autograd.grad(loss(step_once(loss, theta, g, psi, nu, alpha, u)), nu, create_graph=True)[0]
    return nu / torch.sqrt((nu ** 2).mean() + 1e-12) if normalise else nu


def gradient(loss, theta, adapted, noise):
    grads = torch.autograd.grad(loss(theta), [theta[n] for n in adapted], create_graph=True)
    return {n: g + (noise[n] if noise else 0) for n, g in zip(adapted, grads)}


def adapt_one(loss, theta, adapted, psi, alpha, context_dim, u, steps=1, first_order=False, refine=False, noise=None,
              normalise_context=False):
    """Algorithm 1 for one task; loss maps {name: tensor} to a scalar; noise is a list with one {name: tensor} a step."""
    like = next(iter(theta.values()))
    zero = lambda: torch.zeros(context_dim, dtype=like.dtype, device=like.device, requires_grad=True)
    if refine:                                # the authors' released code: one gradient, 2 K passes, nu replaced each pass
        g, nu = gradient(loss, theta, adapted, None), zero()
        for _ in range(2 * steps):
            stepped = step_once(loss, theta, g, psi, nu, alpha, u)
            nu = context(loss, theta, g, psi, nu, alpha, u, normalise_context)
        return stepped
    for k in range(steps):
        g = gradient(loss, theta, adapted, noise[k] if noise else None)
        if first_order:
            g = {n: t.detach() for n, t in g.items()}
        nu = context(loss, theta, g, psi, zero(), alpha, u, normalise_context) if psi else None
        if first_order and psi:
            nu = nu.detach()
        theta = step_once(loss, theta, g, psi, nu, alpha, u)
    return theta
