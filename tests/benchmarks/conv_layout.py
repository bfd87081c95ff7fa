"""What is transposed in a step because convolutions want their channels last: counted in the graphs of both layouts.

python -m tests.benchmarks.conv_layout [size=XL batch=6]. cuDNN's bf16 kernels take NHWC, and transpose what comes in
NCHW. The net is compiled stage by stage on tensors without contents, up to where inductor takes the graphs over: its
decompositions, its partition into forward and backward. Bytes are those of bf16. Prints a table in Markdown.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from data.cli import command
from model.config import LAYOUTS, UNetConfig
from model.unet import UNet
from tests.benchmarks.nets import FEW_BIT, inputs, size

aten = torch.ops.aten
BYTES = 2  # of bf16, and a transpose reads and writes them


@dataclass
class ConvLayout:
    """Counts transposes of a step.

    size: 34M, M, L or XL.
    layouts: of nchw and nhwc.
    batch: images of a micro batch.
    recompute: what backward computes again.
    """

    size: str = "XL"
    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS))
    batch: int = 6
    recompute: str = "none"


def measure(args: ConvLayout) -> None:
    """Print a row for each layout."""
    config = replace(size(args.size), activation=FEW_BIT)
    print("| layout | convolutions of the forward | in NHWC by inductor's rule", end=" | ")
    print("transposed by cuDNN: activations, GB | weights, GB | transposes in the graph | GB |")
    print("|---" * 7 + "|", flush=True)
    for layout in args.layouts:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
            found = count(config, layout, args.batch, args.recompute)
        cells = [
            found["convolutions"], found["by inductor"], gigabytes(found["activations"]), gigabytes(found["weights"]),
            found["transposes"], gigabytes(found["transposed"]),
        ]  # fmt: skip
        print(f"| {layout} | {' | '.join(map(str, cells))} |", flush=True)
        torch.compiler.reset()


def gigabytes(elements: int) -> str:
    """Read and written."""
    return f"{2 * BYTES * elements / 1e9:.2f}"


def count(config: UNetConfig, layout: str, batch: int, recompute: str = "none") -> Counter[str]:
    """Numbers of a micro batch: convolutions, elements that cuDNN or the graph transposes, and the graph's transposes.

    Convolutions are those of the forward; a weight's gradient counts among the weights.
    """
    found: Counter[str] = Counter()

    def compiler(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        of_graph = of_nodes(graph)

        def run(*args: Tensor) -> Any:
            found.update(of_graph)  # equal Stages are compiled once, and each of them runs
            return graph.forward(*args)

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    with FakeTensorMode():
        net = UNet(config, recompute, layout)
        net.compile_stages(backend)
        net(*inputs(config, batch)).square().mean().backward()
    return found


def of_nodes(graph: GraphModule) -> Counter[str]:
    """The numbers of a graph."""
    found: Counter[str] = Counter()
    with torch.backends.mkldnn.flags(enabled=False):  # as for a GPU
        by_inductor = GraphLowering.decide_layout_opt(graph, is_inference=False)
    for node in graph.graph.nodes:
        if node.target is aten.convolution.default:
            x, weight = value(node.args[0]), value(node.args[1])
            found["convolutions"] += 1
            found["by inductor"] += by_inductor
            found["activations"] += sum(map(in_another_layout, (x, value(node))))
            found["weights"] += in_another_layout(weight)
        elif node.target is aten.convolution_backward.default:
            grad, x, weight = (value(argument) for argument in node.args[:3])
            of_x, of_weight, _ = node.args[-1]
            made = node.meta["val"]
            if of_x:
                found["activations"] += in_another_layout(grad) + in_another_layout(made[0])
                found["weights"] += in_another_layout(weight)
            if of_weight:
                found["activations"] += in_another_layout(grad) + in_another_layout(x)
                # Its result lies as the weight does, by autograd's contract.
                found["weights"] += in_another_layout(weight)
        elif node.target is aten.clone.default and transposes(node):
            found["transposes"] += 1
            found["transposed"] += value(node).numel()
    return found


def transposes(clone: Node) -> bool:
    """Whether a copy has its dimensions in another order, and is one: an index is computed where it is read."""
    of = clone.args[0]
    return order(value(clone)) != order(value(of)) and of.target is not aten._unsafe_index.Tensor


def value(node: Node) -> Tensor:
    """The tensor without contents that a node stands for."""
    return node.meta["val"]


def in_another_layout(x: Tensor) -> int:
    """The elements of x, if a kernel for NHWC has to transpose it; else 0."""
    return 0 if x.is_contiguous(memory_format=torch.channels_last) else x.numel()


def order(x: Tensor) -> list[int]:
    """The dimensions of x in the order of its memory, without those of size 1."""
    return sorted((i for i in range(x.ndim) if x.shape[i] > 1), key=lambda i: -x.stride(i))


def main(argv: list[str] | None = None) -> None:
    command(measure, ConvLayout, argv)


if __name__ == "__main__":
    main()
