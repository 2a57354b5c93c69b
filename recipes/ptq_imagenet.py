"""Post-training quantization of a torchvision classifier, calibrated and scored on folders of real images.

    python recipes/ptq_imagenet.py --model mobilenet_v2 --weights mobilenet_v2.pth --calibration calib/ --validation val/

A folder holds one folder of images a class, or images and a ``labels.csv`` (columns ``file,label``). Images that are larger
than needed are centre-cropped (``--resize`` first scales the shorter side). Prints and writes the accuracy of float, of the
converted graph and of the ``.pte`` on the ExecuTorch runtime, on the same images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from results import output_folder, write_result
from torch.utils.data import DataLoader

import quantflow as qf
from quantflow.allocator import keep_freed_memory
from quantflow.vision.images import first, labelled_folder, preprocessing
from quantflow.vision.models import classifier
from quantizers import XNNPACKQuantizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="any torchvision classification model")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision weights by name, or a file with a state dict")
    parser.add_argument("--calibration", type=Path, required=True, help="images to calibrate on")
    parser.add_argument("--validation", type=Path, required=True, help="images to score on")
    parser.add_argument("--calibration-images", type=int, default=500)
    parser.add_argument("--validation-images", type=int, help="score on the first so many (default: all)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--resize", action="store_true", help="scale the shorter side to 256/224 of the size, then crop"
    )
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--skip", nargs="*", default=(), metavar="LAYER", help="layers to leave in float, by name")
    parser.add_argument("--output", type=Path, default=Path("runs/ptq_imagenet"))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    start = time.perf_counter()
    keep_freed_memory()
    folder = output_folder(options.output)
    transform = preprocessing(options.image_size, resize=options.resize)
    calibration = first(labelled_folder(options.calibration, transform), options.calibration_images)
    validation = first(labelled_folder(options.validation, transform), options.validation_images)
    model = classifier(options.model, None, options.weights).eval()
    example = (torch.zeros(1, 3, options.image_size, options.image_size),)

    quantizer = XNNPACKQuantizer(skip=options.skip)
    result = qf.quantize(model, example, DataLoader(calibration, options.batch_size), quantizer=quantizer)
    print(result.report)
    result.program.save(folder / "model.pte")

    stages = {"float": model, "converted": result.graph, "pte": result.program}
    found = qf.verify(stages, DataLoader(validation, options.batch_size))
    print(f"\n{found}")
    pte = found["pte"]
    assert pte.latency is not None  # it ran
    write_result(
        folder,
        {
            "model": options.model,
            "calibration_images": len(calibration),  # type: ignore[arg-type]
            "validation_images": found.examples,
            **{f"{stage.name}_accuracy": stage.output.top1 for stage in found.stages},
            "drop_points": pte.output.drop,
            "drop_interval_95": pte.output.drop_interval,
            "agreement_with_float": pte.output.agreement,
            "logit_sqnr_db": pte.output.sqnr_db,
            "pte_sqnr_against_converted_db": pte.output.step_sqnr_db,
            "pte_bytes": pte.bytes,
            "pte_latency_ms": pte.latency.median_ms,
            "delegated_fraction": result.report.delegated_fraction,
            "seconds_by_stage": result.report.seconds,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
