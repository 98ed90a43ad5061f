# Writes a tiny Stable Diffusion as one file, with the names of its first release, as most models are shared. Holds no
# tests. The names were read off the layers of the first release; diffusers reads them back.
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0"}
OUTER |= {"time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int) -> str:
    """The old name of a weight of a U-Net with so many layers in a block, down; up it has one more."""
    part, kind = name.rsplit(".", 1)
    if part in OUTER:
        return f"{OUTER[part]}.{kind}"
    block, number, what, index, rest = re.match(r"(\w+)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name).groups()
    rest = f"{RESNET[rest.rsplit('.', 1)[0]]}.{kind}" if what == "resnets" else rest
    if block == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * int(index)}.{rest}"
    first = int(number) * (layers + 1)
    if what == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{kind}"
    if what == "upsamplers":  # of a block without attention
        return f"output_blocks.{first + layers}.1.{rest}"
    place = first + int(index) + (block == "down")
    return f"{'input' if block == 'down' else 'output'}_blocks.{place}.{int(what == 'attentions')}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """The old name of a weight of an autoencoder with so many blocks, which it counted from the image, up too."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0\.(.*)\.", lambda found: f"mid.attn_1.{ATTENTION[found[1]]}.", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{blocks - 1 - int(found[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def save_single_file(pipeline, file: Path) -> None:
    tensors = {}
    for name, weight in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, pipeline.unet.config.layers_per_block)}"] = weight
    for name, weight in pipeline.vae.state_dict().items():
        name = vae_name(name, len(pipeline.vae.config.block_out_channels))
        if ".attn_1." in name and weight.dim() == 2:
            weight = weight[:, :, None, None]  # attention was made of convolutions
        tensors[f"first_stage_model.{name}"] = weight
    for name, weight in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    tensors = {name: weight.contiguous() for name, weight in tensors.items()}
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save({"state_dict": tensors}, file)
