"""What a config costs, before it is paid for. Nothing is run; no array is made.

    python -m experiments.plan --config=config:recipes.quick_text.quick                            config and figures
    python -m experiments.plan --config=config:recipes.quick_text.quick --compile                  and bytes, for these devices
    python -m experiments.plan --config=config:recipes.quick_text.quick --topology=v5e:1x1         and bytes, for that TPU slice
    python -m experiments.plan --config=config:pods.serving.llama3_8b_128k --topology=v5e:2x4      a model that answers prompts
    python -m experiments.plan --support                                                           what combines with what

`--topology` runs the real TPU compiler on any machine; it needs the `tpu` extra. The config's mesh uses the whole slice. What
each communication would cost is printed first, in closed form; compiling takes minutes, and `--dry_run` leaves it out.
"""

import jax
from absl import flags

from experiments.program import Arguments, launch
from lcx.inference.serving import Serving
from lcx.parallel.topology import topology_devices
from lcx.plan import communication_report, compiled, listed, report
from lcx.serving_plan import serving_compiled, serving_report
from lcx.spec import SpecError
from lcx.support import check_backends, check_devices, validate, validate_serving
from lcx.support_table import support_summary, support_table
from lcx.training.experiment import Experiment


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "a TPU slice to compile for, such as v5e:16x16", flag_values=values)
    flags.DEFINE_bool("compile", False, "compile for the devices of this machine", flag_values=values)
    flags.DEFINE_bool("support", False, "print what combines with what, and stop", flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    if asked.support:
        print(support_table(), support_summary(), sep="\n\n")
        return
    if asked.compile and asked.topology is not None:
        raise SpecError(f"--compile beside --topology={asked.topology}: expected one of them")
    planned = arguments.spec((Experiment, Serving))
    serving = isinstance(planned, Serving)
    (validate_serving if serving else validate)(planned)
    devices = None
    if asked.topology is not None:
        devices = topology_devices(asked.topology)
        check_backends(planned, "tpu")
        if planned.mesh.size != len(devices):
            expected = f"the {len(devices)} of --topology={asked.topology}"
            raise SpecError(f"mesh = {planned.mesh.size} devices: expected {expected}")
    elif asked.compile:
        devices = jax.devices()
        check_devices(planned, len(devices))
    print(serving_report(planned) if serving else report(planned))
    if devices is None:
        return
    if not serving:
        print("", communication_report(planned, devices[0].device_kind), sep="\n")
    if not arguments.dry_run:
        print("", listed((serving_compiled if serving else compiled)(planned, devices)), sep="\n")


if __name__ == "__main__":
    launch(main)
