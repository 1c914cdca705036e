"""A request's body: a safetensors file of images, with the request as JSON in its metadata."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from lightning_fdfo.remote.protocol import (
    MAX_HEADER,
    Limits,
    RefusalError,
    ScoreRequest,
    first_problem,
    parse_prompts,
    to_json,
)

# Images out


def encode_request(request: ScoreRequest, images: Tensor) -> bytes:
    """The body of a request.

    Args:
        request: of N prompts.
        images: [N, 3, H, W], float32 in [0, 1].

    Example:
        >>> request = ScoreRequest(fingerprint="", prompts=["a cat"], metadata=[{}], encoding="safetensors")
        >>> body = encode_request(request, torch.rand(1, 3, 8, 8))
        >>> decode_request(body, Limits())[0] == request
        True
    """
    if request.encoding == "png":
        tensors = {str(row): _to_png(image) for row, image in enumerate(images)}
    else:
        tensors = {"images": images.float().cpu().contiguous()}
    return bytes(safetensors.torch.save(tensors, {"request": to_json(request)}))


def _to_png(image: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> the bytes of a PNG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


# Images in: whatever comes, it is a batch of images or a RefusalError


class _Header(BaseModel):
    """A safetensors file's header, as far as the request goes."""

    metadata: dict[str, str] = Field(alias="__metadata__")


def decode_request(body: bytes, limits: Limits) -> tuple[ScoreRequest, Tensor]:
    """What a body asks for, and its images: [N, 3, H, W], float32, each finite and in [0, 1].

    Raises:
        RefusalError: anything else, or more than the limits allow.
    """
    request = parse_prompts(ScoreRequest, _request_json(body))
    num_images = len(request.prompts)
    if num_images > limits.max_batch:
        raise RefusalError(413, f"expected at most {limits.max_batch} images, got {num_images}")
    try:
        tensors = dict(safetensors.deserialize(body))  # type: ignore[no-untyped-call]
    except Exception as error:  # a library's own, on bytes that anybody may have sent
        raise RefusalError(400, f"expected a safetensors file: {error}") from error
    images = _from_png(tensors, num_images, limits) if request.encoding == "png" else _from_tensor(tensors, num_images)
    _check_pixels(images[:, 0].numel(), limits)
    if not bool(((images >= 0) & (images <= 1)).all()):  # NaN is neither
        raise RefusalError(422, "expected images of finite numbers in [0, 1]")
    return request, images


def _request_json(body: bytes) -> str:
    """The request in a safetensors file's header."""
    size = struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 0
    if not 0 < size <= len(body) - 8:
        raise RefusalError(400, "expected a safetensors file, got one that is cut off or none")
    if size > MAX_HEADER:
        raise RefusalError(413, f"expected a header of at most {MAX_HEADER} bytes, got {size}")
    try:
        return _Header.model_validate_json(body[8 : 8 + size]).metadata["request"]
    except ValidationError as error:
        raise RefusalError(400, f"safetensors header: {first_problem(error)}") from error
    except KeyError as error:
        raise RefusalError(400, 'safetensors header: expected the metadata "request"') from error


def _from_tensor(tensors: Mapping[str, Mapping[str, Any]], num_images: int) -> Tensor:
    found = tensors["images"] if set(tensors) == {"images"} else None
    shape: Sequence[int] = found["shape"] if found else ()
    if found is None or found["dtype"] != "F32" or len(shape) != 4 or tuple(shape[:2]) != (num_images, 3):
        got = f"{found['dtype']} {shape}" if found else f"{len(tensors)} tensors"
        raise RefusalError(400, f'expected one tensor "images" of F32 [{num_images}, 3, H, W], got {got}')
    if 0 in shape:
        raise RefusalError(400, f"expected images of at least one pixel, got {shape}")
    return torch.frombuffer(found["data"], dtype=torch.float32).reshape(*shape)


def _from_png(tensors: Mapping[str, Mapping[str, Any]], num_images: int, limits: Limits) -> Tensor:
    if set(tensors) != {str(row) for row in range(num_images)} or any(t["dtype"] != "U8" for t in tensors.values()):
        raise RefusalError(400, f"expected {num_images} PNG of U8 bytes, named 0 to {num_images - 1}")
    size: tuple[int, int] | None = None
    pixels = []
    for row in range(num_images):  # one after the other: what a file holds beside its pixels is dropped with it
        try:
            with Image.open(io.BytesIO(tensors[str(row)]["data"]), formats=["PNG"]) as picture:  # reads no pixel
                size = size or picture.size
                _check_pixels(num_images * picture.width * picture.height, limits)
                if picture.mode != "RGB" or picture.size != size:
                    raise RefusalError(400, f"expected RGB images of one size, got {picture.mode} of {picture.size}")
                pixels.append(np.array(picture))
        except RefusalError:
            raise
        except Exception as error:  # Pillow's, of many kinds, on bytes that anybody may have sent
            raise RefusalError(400, f"expected PNG files: {error}") from error
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


def _check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_pixels:
        raise RefusalError(413, f"expected at most {limits.max_pixels} pixels in all, got {pixels}")
