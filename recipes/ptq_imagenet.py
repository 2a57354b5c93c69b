"""Post-training quantization of a torchvision classifier, calibrated and scored on folders of real images.

    python recipes/ptq_imagenet.py --model mobilenet_v2 --weights mobilenet_v2.pth --calibration calib/ --validation val/
    python recipes/ptq_imagenet.py ... --resume --bits 4                     # continue from a saved calibration
    torchrun --nproc-per-node 2 recipes/ptq_imagenet.py ...                  # calibrate in several processes

A folder holds one folder of images per class, or images and a ``labels.csv`` (columns ``file,label``). Larger images are
center-cropped (``--resize`` first scales the shorter side). The recipe prints and writes the accuracy of the float graph, of
the converted graph and of the ``.pte`` on the ExecuTorch runtime, on the same images. It saves the observed ranges and the
sample for recovery next to the program; ``--resume`` loads them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from results import output_folder, write_result
from torch.utils.data import DataLoader, Subset

import quantflow as qf
from quantflow.distributed import rank, world_size
from quantflow.files import write_atomically
from quantflow.malloc import keep_freed_memory
from quantflow.observers import OBSERVERS
from quantflow.vision.images import count_of, first, labelled_folder, preprocessing
from quantflow.vision.models import classifier
from quantizers import W4A8, Scheme, TensorScheme, XNNPACKQuantizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="any torchvision classification model")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision weights by name, or a file with a state dict")
    parser.add_argument("--calibration", type=Path, required=True, help="images to calibrate on")
    parser.add_argument("--validation", type=Path, required=True, help="images to score on")
    parser.add_argument("--calibration-images", type=int, default=500)
    parser.add_argument("--patience", type=int, help="end calibration when no range grew in this many batches")
    parser.add_argument("--resume", action="store_true", help="load the calibration in the output folder")
    parser.add_argument("--validation-images", type=int, help="number of images to score on (default: all)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--resize", action="store_true", help="scale the shorter side to 256/224 of the size, then crop"
    )
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--observer", default="mse", choices=OBSERVERS, help="how activations' ranges are estimated")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 4), help="of weights")
    parser.add_argument("--no-recover", action="store_true", help="ranges as observed, weights rounded to nearest")
    parser.add_argument("--skip", nargs="*", default=(), metavar="LAYER", help="layers to leave in float, by name")
    parser.add_argument("--output", type=Path, default=Path("runs/ptq_imagenet"))
    return parser.parse_args()


def save(prepared: torch.nn.Module, sample: qf.Sample, path: Path) -> None:
    """Save the observed ranges and the sample."""
    observed = {f"graph.{name}": tensor.clone() for name, tensor in observations(prepared).items()}
    observed["weights"] = checksums(prepared)
    drawn = {f"sample.{name}": tensor.contiguous() for name, tensor in sample.state_dict().items()}
    write_atomically(path, safetensors.torch.save({**observed, **drawn}), stage="recipe")


def resume(prepared: torch.nn.Module, sample: qf.Sample, path: Path) -> None:
    """Load the file that :func:`save` wrote.

    Raises:
        QuantflowError: at stage ``"recipe"``, if the file is missing or belongs to another network.
    """
    try:
        state = safetensors.torch.load(path.read_bytes())
        found = {name.removeprefix("graph."): state.pop(name) for name in list(state) if name.startswith("graph.")}
        if not torch.equal(state.pop("weights", torch.empty(0)), checksums(prepared)):
            raise ValueError("it is of other weights")
        if found.keys() != observations(prepared).keys():
            raise ValueError("it is of another network or observer")
        prepared.load_state_dict(found, strict=False)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason, remedy = f"no calibration to resume from: {error}", "run once without --resume"
        raise qf.QuantflowError("recipe", reason, node=str(path), remedy=remedy) from error
    sample.load_state_dict({name.removeprefix("sample."): tensor for name, tensor in state.items()})


def observations(prepared: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a prepared graph without its weights."""
    weights = dict(prepared.named_parameters())
    return {name: tensor for name, tensor in prepared.state_dict().items() if name not in weights}


def checksums(prepared: torch.nn.Module) -> torch.Tensor:
    """One checksum per parameter."""
    return torch.stack([parameter.detach().double().sum() for parameter in prepared.parameters()])


def main() -> None:
    options = parse_arguments()
    start = time.perf_counter()
    distributed = "LOCAL_RANK" in os.environ
    if distributed:
        torch.distributed.init_process_group("gloo")
    keep_freed_memory()
    folder = output_folder(options.output)
    transform = preprocessing(options.image_size, resize=options.resize)
    calibration = first(labelled_folder(options.calibration, transform), options.calibration_images)
    validation = first(labelled_folder(options.validation, transform), options.validation_images)
    model = classifier(options.model, None, options.weights).eval()
    example = (calibration[0][0].unsqueeze(0),)  # lowering compares the program with the graph on it

    scheme = Scheme(TensorScheme(observer=options.observer), W4A8.weight if options.bits == 4 else Scheme().weight)
    quantizer = XNNPACKQuantizer(scheme, skip=options.skip)
    graph = qf.export(model, example, dynamic_batch=True).module()
    print(quantizer.plan(graph))
    prepared, sample, state = qf.prepare(graph, quantizer), qf.Sample(), folder / "calibration.safetensors"
    if options.resume:
        resume(prepared, sample, state)
    else:
        share = Subset(calibration, range(rank(), count_of(calibration), world_size()))
        qf.calibrate(prepared, DataLoader(share, options.batch_size), sample=sample, patience=options.patience)
    first_process = rank() == 0
    if distributed:
        torch.distributed.destroy_process_group()
    if not first_process:  # only rank 0 continues: it has the statistics of all processes
        return
    save(prepared, sample, state)
    calibrated = time.perf_counter()
    if not options.no_recover:
        recovered = qf.recover(prepared, sample)
        print(recovered)
        prepared = recovered.graph
    converted = qf.convert(prepared)
    quantized = time.perf_counter()
    program = qf.export(converted, example).to_core_aten().to_edge("xnnpack").to_executorch()
    program.save(folder / "model.pte")
    lowered = time.perf_counter()

    stages = {"float": model, "converted": converted, "pte": program}
    found = qf.verify(stages, DataLoader(validation, options.batch_size))
    print(f"\n{found}")
    pte = found["pte"]
    assert pte.latency is not None  # it ran
    write_result(
        folder,
        {
            "model": options.model,
            "calibration_images": count_of(calibration),
            "validation_images": found.examples,
            **{f"{stage.name}_accuracy": stage.output.top1 for stage in found.stages},
            "drop_points": pte.output.drop,
            "drop_interval_95": pte.output.drop_interval,
            "agreement_with_float": pte.output.agreement,
            "logit_sqnr_db": pte.output.sqnr_db,
            "pte_sqnr_against_converted_db": pte.output.step_sqnr_db,
            "pte_bytes": pte.bytes,
            "pte_latency_ms": pte.latency.median_ms,
            "delegated_fraction": program.delegation.fraction if program.delegation else 0.0,
            "calibrate_seconds": round(calibrated - start, 1),
            "recover_seconds": round(quantized - calibrated, 1),
            "lower_seconds": round(lowered - quantized, 1),
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
