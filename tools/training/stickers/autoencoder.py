"""Stage two: pictures of 256x256 to latents of 4x32x32 and back, and the latents of the pictures drawn ahead."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ....demo.checkpoint import LATENT_SCALE
from ....demo.stickers import model, reader, world
from ..stage import DEVICE, Stage, initialise, mixed
from . import dataset
from .reader import as_tensor as unit
from .sources import WORK

WEIGHTS = model.WEIGHTS / "autoencoder.safetensors"


def as_tensor(pictures: np.ndarray) -> Tensor:
    """``uint8 [B, H, W, 3]`` to ``float [B, 3, H, W]`` in [-1, 1]."""
    batch = torch.from_numpy(np.array(pictures, order="C")).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return batch.contiguous(memory_format=torch.channels_last)


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)V over all places, ``[B, C, h, w]`` each: ComfyUI's own asks for free memory, which cannot be compiled."""
    rows, columns, values = (t.flatten(2) for t in (q, k, v))
    weights = (rows.transpose(1, 2) @ columns * q.shape[1] ** -0.5).softmax(dim=-1)
    return (values @ weights.transpose(1, 2)).reshape(q.shape)


def crops(rng: np.random.Generator, shards: list, number: int, side: int) -> np.ndarray:
    """Random squares of pictures, two in three of them around a thing: ``uint8 [number, side, side, 3]``."""
    out = np.empty((number, side, side, 3), np.uint8)
    for i in range(number):
        pictures, owners = shards[rng.integers(len(shards))]
        k = rng.integers(len(pictures))
        y, x = rng.integers(0, (world.SIZE - side) // 8 + 1, size=2) * 8  # squares of styles keep their phase
        if rng.random() < 0.67:
            places = np.argwhere(owners[k])
            if len(places):
                centre = places[rng.integers(len(places))] * (world.SIZE // dataset.OWNER) - side // 2
                y, x = (centre // 8 * 8).clip(0, world.SIZE - side)
        out[i] = pictures[k, y : y + side, x : x + side]
    return out


def train(minutes: float, batch: int) -> nn.Module:
    """Crops first, which are quick; whole pictures at the end, because group norms see the whole picture."""
    net: Any = model.ARCHITECTURE.autoencoder()
    initialise(net, 1)
    stage = Stage(
        "stickers_autoencoder", {"autoencoder": net.to(memory_format=torch.channels_last)}, minutes, 1.5e-3, device=DEVICE
    )
    for part in (net.encoder, net.decoder):
        part.mid.attn_1.optimized_attention = _plain_attention
    rng = np.random.default_rng(stage.step)
    shards = [dataset.load("train", k) for k in dataset.shards("train")]
    encoder, decoder = (torch.compile(part, dynamic=False) for part in (net.encoder, net.decoder))

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        crop, number = (64, batch) if stage.spent < 0.72 * stage.seconds else (world.SIZE, max(2, batch // 4))
        target = as_tensor(crops(rng, shards, number, crop)).to(DEVICE)
        with mixed():
            moments = net.quant_conv(encoder(target))
            mean, log_variance = moments.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
            out = decoder(net.post_quant_conv(z)).float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        error, square = (out - target).abs().mean(), F.mse_loss(out, target)
        slope = torch.stack([(a - b).abs().mean() for a, b in zip(_slopes(out), _slopes(target), strict=True)]).mean()
        return error + square + slope + 1e-4 * kl, {
            "L1": error.detach(),
            "mse": square.detach(),
            "slope": slope.detach(),
            "kl": kl.detach(),
        }

    stage.run(loss, batch)
    return stage.kept("autoencoder").to(DEVICE)


def _energies(images: Tensor) -> list[Tensor]:
    """How much goes on around each place, at three scales and in four directions: the deviation of differences, ``[B, 3, h, w]`` each."""
    found = []
    for _ in range(3):
        inner = images[:, :, 1:, 1:]
        for other in (images[:, :, 1:, :-1], images[:, :, :-1, 1:], images[:, :, :-1, :-1]):
            found.append((F.avg_pool2d((inner - other) ** 2, 8, 4) + 1e-5).sqrt())
        found.append((F.avg_pool2d((images[:, :, 1:, :-1] - images[:, :, :-1, 1:]) ** 2, 8, 4) + 1e-5).sqrt())
        images = F.avg_pool2d(images, 2)
    return found


def finish(net: Any, minutes: float, batch: int) -> nn.Module:
    """The decoder alone, on whole pictures: texture that nothing foretells, as strokes of a brush, is to be there and not averaged out.

    Latents stay what they are, so that this needs no new denoiser.
    """
    parts: Any = {"decoder": net.decoder.requires_grad_(True), "post_quant_conv": net.post_quant_conv.requires_grad_(True)}
    stage = Stage("stickers_decoder", parts, minutes, 7e-4, device=DEVICE)
    net.decoder.mid.attn_1.optimized_attention = _plain_attention
    rng = np.random.default_rng([1, stage.step])
    shards = [dataset.load("train", k) for k in dataset.shards("train")]
    decoder = torch.compile(net.decoder, dynamic=False)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = crops(rng, shards, max(2, batch // 4), world.SIZE)
        target = as_tensor(pictures).to(DEVICE)
        with mixed():
            z = moments(net, pictures)[:, :4]
            out = decoder(net.post_quant_conv(z)).float()
        error = (out - target).abs().mean()
        pairs = zip(_energies(out), _energies(target), strict=True)
        energy = torch.stack([(a - b).abs().mean() for a, b in pairs]).mean()
        return error + 4 * energy, {"L1": error.detach(), "energy": energy.detach()}

    stage.run(loss, batch)
    net.decoder, net.post_quant_conv = stage.kept("decoder").to(DEVICE), stage.kept("post_quant_conv").to(DEVICE)
    return net


def moments(net: nn.Module, pictures: np.ndarray) -> Tensor:
    """Means and log variances ``float [B, 8, 32, 32]``, not scaled; on `DEVICE`, where the network is."""
    with torch.no_grad(), mixed():
        return net.quant_conv(net.encoder(as_tensor(pictures).to(DEVICE))).float()


def reconstructed(net: nn.Module, pictures: np.ndarray) -> np.ndarray:
    """Pictures through latents and back, ``uint8 [B, H, W, 3]``."""
    out = []
    for i in range(0, len(pictures), 8):
        with torch.no_grad(), mixed():
            images = net.decoder(net.post_quant_conv(moments(net, pictures[i : i + 8])[:, :4])).float()
        out.append(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def gate(net: nn.Module, count: int = 300) -> float:
    """The share of words that the reader reads in reconstructions as it reads them in the originals, each kind's; the worst."""
    eye, pictures = reader.load_reader(), dataset.load("test", 0)[0][:count]
    before, after = reader.read(eye, unit(pictures)), reader.read(eye, unit(reconstructed(net, pictures)))
    same: dict[str, list[bool]] = {
        word: [] for word in ("found", "noun", "colour", "accessory", "style", "place", "place's style")
    }
    for old, new in zip(before, after, strict=True):
        same["place"].append(old.place == new.place)
        if old.place in world.SCENES:
            same["place's style"].append(old.style == new.style)
        for t in (t for t in old.things if t.confidence >= reader.SURE):
            near = min(new.things, key=lambda f: abs(f.x - t.x) + abs(f.y - t.y), default=None)
            there = near is not None and near.confidence >= reader.SURE and abs(near.x - t.x) + abs(near.y - t.y) < t.width / 2
            same["found"].append(there)
            if there:
                for word in ("noun", "accessory", "style"):
                    same[word].append(getattr(near, word) == getattr(t, word))
                if t.colour and t.style not in world.COLOURLESS:
                    same["colour"].append(near.colour == t.colour)
    shares = {word: float(np.mean(answers)) for word, answers in same.items()}
    print("read as in the originals: " + ", ".join(f"{word} {100 * share:.1f} %" for word, share in shares.items()), flush=True)
    return min(shares.values())


def normalise(net: nn.Module, pictures: np.ndarray) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions: latents times `LATENT_SCALE` get mean 0, deviation 1."""
    found = torch.cat([moments(net, pictures[i : i + 8])[:, :4] for i in range(0, len(pictures), 8)])
    shift, scale = found.mean((0, 2, 3)), found.std((0, 2, 3)) * LATENT_SCALE
    into, out = net.quant_conv, net.post_quant_conv
    with torch.no_grad():
        out.bias.add_(out.weight[:, :, 0, 0] @ shift)
        out.weight.mul_(scale[None, :, None, None])
        into.bias[:4].sub_(shift).div_(scale)
        into.weight[:4].div_(scale[:, None, None, None])
        into.bias[4:].sub_(2 * scale.log())


def preview_factors(net: nn.Module, pictures: np.ndarray) -> Tensor:
    """Least-squares colours of latents, ``[5, 3]``: four channels and a constant, for ComfyUI's previews."""
    latents = moments(net, pictures)[:, :4] * LATENT_SCALE
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).permute(0, 2, 3, 1).reshape(-1, 5)
    colours = F.avg_pool2d(as_tensor(pictures).to(DEVICE), 8).permute(0, 2, 3, 1).reshape(-1, 3)
    return torch.linalg.lstsq(known.cpu(), colours.cpu()).solution


def export(net: nn.Module, command: str) -> None:
    """Write the weights, normalised, as fp16 safetensors."""
    pictures = dataset.load("train", 0)[0]
    normalise(net, pictures[:512])
    parts = {**net.state_dict(), "preview_factors": preview_factors(net, pictures[512:640])}
    WEIGHTS.parent.mkdir(exist_ok=True)
    metadata = {"data_version": world.DATA_VERSION, "command": command}
    save_file({k: v.half().cpu().contiguous() for k, v in parts.items()}, WEIGHTS, metadata=metadata)
    print(f"saved {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)


def shipped() -> nn.Module:
    """The autoencoder as it ships."""
    weights = model.stored("autoencoder")
    del weights["preview_factors"]
    net = model.ARCHITECTURE.autoencoder().eval().requires_grad_(False)
    net.load_state_dict(weights)
    return net.to(DEVICE, memory_format=torch.channels_last)


def latents(split: str = "train") -> Tensor:
    """Latents of deviation 1 of every drawn picture, ``float16 [N, 4, 32, 32]`` in order; kept on disk by shards."""
    out, net = [], None
    for shard in dataset.shards(split):
        path = WORK / "pictures" / f"{split}_{shard:03d}_latents.pt"
        if not path.exists():
            net = net or shipped()
            pictures = dataset.load(split, shard)[0]
            found = [(moments(net, pictures[i : i + 8])[:, :4] * LATENT_SCALE).half().cpu() for i in range(0, len(pictures), 8)]
            torch.save(torch.cat(found), path)
            print(f"latents: {split} {shard}", flush=True)
        out.append(torch.load(path, weights_only=True))
    return torch.cat(out)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=80, help="training time in all; 0 only measures what ships")
    parser.add_argument("--finish", type=float, default=60, help="minutes for the decoder alone, after that")
    parser.add_argument("--batch", type=int, default=8, help="crops; a quarter as many whole pictures")
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    if args.minutes:
        command = f"run.py train stickers autoencoder --minutes {args.minutes:g} --finish {args.finish:g} --batch {args.batch}"
        export(finish(train(args.minutes, args.batch), args.finish, args.batch), command)
    return 1 if gate(shipped()) < 0.97 else 0
