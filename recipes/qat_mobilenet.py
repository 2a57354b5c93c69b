"""Quantization-aware training of an image classifier, from float weights to an ExecuTorch program.

    python recipes/qat_mobilenet.py                                    # MobileNetV2 on handwritten digits, minutes on a CPU
    python recipes/qat_mobilenet.py --weights DEFAULT --data images/ --scheme w4a8      # your images, your trained network
    python recipes/qat_mobilenet.py --model resnet18 --weights DEFAULT --data CIFAR10 --image-size 224 --device cuda
    python recipes/qat_mobilenet.py --resume                           # continue an interrupted run
    torchrun --nproc-per-node 2 recipes/qat_mobilenet.py               # train in several processes

The recipe trains in float where ``--weights`` don't cover the network, quantizes it after training (PTQ: calibration and
recovery), goes on from there with fake quantization on the same graph (QAT), converts, lowers to XNNPACK, and measures float,
fake-quantized, converted, ``.pte`` and PTQ on the same held-out images. QAT learns from the float network, so images need no
labels; ``--labels`` learns from theirs as well. It ends with PTQ's weights unless training improves on them, on images that it
does not train on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from results import output_folder, write_result
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import quantflow as qf
from quantflow.distributed import init_process_group, world_size
from quantflow.malloc import keep_freed_memory
from quantflow.vision.images import first, held_out, image_data
from quantflow.vision.models import classifier, covers
from quantizers import XNNPACKQuantizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="any torchvision classification model")
    parser.add_argument("--weights", help="torchvision weights by name, or a file with a state dict")
    parser.add_argument("--scheme", default="w8a8", choices=("w8a8", "w4a8"), help="bits of weights and activations")
    parser.add_argument("--data", default="digits", help="digits, an image folder, or a torchvision data set by name")
    parser.add_argument("--validation", help="an image folder to score on (default: the held-out part of --data)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="where torchvision data sets are kept")
    parser.add_argument("--image-size", type=int, help="default: 64 for digits, else 224")
    parser.add_argument("--no-resize", action="store_true", help="crop images without scaling them first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--float-epochs", type=int, help="epochs in float first (default: 9, or 0 where --weights cover the network)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs of quantization-aware training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate in float")
    parser.add_argument(
        "--calibration-images", type=int, default=500, help="training images for calibration and recovery"
    )
    parser.add_argument("--labels", action="store_true", help="in QAT, learn from the labels as well")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/qat_mobilenet"))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    start = time.perf_counter()
    distributed = "LOCAL_RANK" in os.environ
    if distributed:
        own = init_process_group()
        options.device = str(own) if options.device.startswith("cuda") else options.device
    keep_freed_memory()
    folder = output_folder(options.output)
    torch.manual_seed(options.seed)
    size = options.image_size or (64 if options.data == "digits" else 224)
    data = image_data(
        options.data, options.data_root, size, options.seed, options.validation, resize=not options.no_resize
    )
    training_images, selection = held_out(data.train, 0.1, options.seed)  # the best state is chosen by the selection
    model = classifier(options.model, data.classes, options.weights)
    sampler: DistributedSampler | None = (
        DistributedSampler(training_images, seed=options.seed, drop_last=True) if distributed else None
    )
    loader = DataLoader(
        training_images,
        options.batch_size // world_size(),
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        generator=torch.Generator(),
    )
    if not len(loader):
        remedy = "a smaller --batch-size, or more data"
        raise qf.QuantflowError("recipe", "no whole batch of training images", node="--batch-size", remedy=remedy)
    training = {"seed": options.seed, "compile": options.compile, "amp": options.device.startswith("cuda")}
    example = (torch.zeros(1, 3, size, size),)

    # Float: the captured graph trains like the model itself.
    float_graph = qf.export(model, example, dynamic_batch=True).module().to(options.device)
    trained = options.weights is not None and covers(options.model, data.classes, options.weights)
    float_epochs = options.float_epochs if options.float_epochs is not None else (0 if trained else 9)
    if float_epochs:
        optimizer = torch.optim.SGD(
            float_graph.parameters(), options.lr, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        steps = float_epochs * len(loader)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
        print(f"training {options.model} in float, {float_epochs} epochs")
        checkpoints = qf.Checkpoints(folder / "float", resume=options.resume)
        qf.train(
            float_graph,
            loader,
            epochs=float_epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            checkpoints=checkpoints,
            **training,
        )
    float_graph.eval()

    # PTQ: ranges from calibration, then recovery of the accuracy.
    calibration = DataLoader(first(training_images, options.calibration_images), options.batch_size)
    sample = qf.Sample(options.calibration_images)
    prepared = qf.prepare(float_graph, XNNPACKQuantizer(options.scheme), qat=True)
    recovered = qf.recover(qf.calibrate(prepared, calibration, sample=sample), sample)
    print(recovered)
    ptq_graph = qf.convert(recovered.graph)

    # QAT: the same graph goes on from there. The float network is its teacher.
    print(f"quantization-aware training, {options.epochs} epochs")
    qat_graph, chosen_by = recovered.graph, DataLoader(selection, options.batch_size)
    history = qf.train(
        qat_graph,
        loader,
        epochs=options.epochs,
        loss=F.cross_entropy if options.labels else None,
        validate=qf.Accuracy(chosen_by) if options.labels else qf.Fidelity(float_graph, chosen_by),
        checkpoints=qf.Checkpoints(folder / "qat", resume=options.resume),
        **training,
    )
    if distributed:
        torch.distributed.destroy_process_group()
        if os.environ["RANK"] != "0":  # only rank 0 measures and writes
            return
    history.plot().savefig(folder / "history.png")
    kept = "PTQ" if history.best_epoch == -1 else "QAT"
    figure = "accuracy" if options.labels else "signal to noise, dB,"
    print(
        f"kept: {kept} ({figure} on images not trained on: PTQ {history.start_metric:.3f}, QAT {max(history.metric):.3f})"
    )

    # Conversion to integers and lowering to a program.
    converted = qf.convert(qat_graph.cpu())
    print("lowering: QAT, PTQ and float")
    program = lower(converted, example)
    program.save(folder / "model.pte")
    ptq_program = lower(ptq_graph.cpu(), example)
    float_program = lower(float_graph.cpu(), example)

    # All stages are measured on the same held-out images; the .pte stages run on the ExecuTorch runtime.
    stages = {
        "float": float_graph,
        "fake_quant": qat_graph,
        "converted": converted,
        "pte": program,
        "ptq_pte": ptq_program,
        "float_pte": float_program,
    }
    found = qf.verify(stages, DataLoader(data.held_out, options.batch_size))
    print(f"\n{found}")
    pte, float_pte = found["pte"], found["float_pte"]
    assert pte.latency is not None  # both ran
    assert float_pte.latency is not None
    write_result(
        folder,
        {
            "model": options.model,
            "scheme": options.scheme,
            "kept": kept,
            "held_out_images": found.examples,
            **{f"{stage.name}_accuracy": stage.output.top1 for stage in found.stages},
            "pte_agreement": pte.output.step_agreement,
            "pte_float_agreement": pte.output.agreement,
            "ptq_pte_float_agreement": found["ptq_pte"].output.agreement,
            "float_bytes": float_pte.bytes,
            "pte_bytes": pte.bytes,
            "float_latency_ms": float_pte.latency.median_ms,
            "pte_latency_ms": pte.latency.median_ms,
            "delegated_fraction": program.delegation.fraction if program.delegation else None,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


def lower(graph: torch.nn.Module, example: tuple[torch.Tensor]) -> qf.Program:
    return qf.export(graph, example).to_core_aten().to_edge("xnnpack").to_executorch()


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
