"""What the engines have in common: those who carry jobs out on a cloud or a cluster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gqa_scaling.config import require
from gqa_scaling.hardware import Slice
from launch.jobs import Job
from launch.submission import Step, Study, run
from launch.targets import Target, sizes_up_to

# What to give for a field of `Target` that several engines need.
BUCKET = "where the runs are kept, such as gs://my-bucket"
PROJECT = "the Google Cloud project"
SAVE_SECONDS = 120  # that a run is given to finish a step and save

Jobs = Sequence[Job]


@dataclass(frozen=True)
class Engine:
    """Who carries jobs out elsewhere: each module beside this one renders for one of them.

    `options` are those of the command line that it reads; `needs` says, by field of `Target`, what
    to give where it is empty, and `refuse` raises UserError for fields that cannot be. `check` raises
    UserError for what is missing here, such as tools and accounts. `offered` are the slices that a
    run may get. `render` is what would be submitted; by default `submit` writes its files and runs
    its commands. `after` is what to type next. One that `sends_code` has machines get this folder. Jobs of
    one that does not share this machine's files get this folder and the bucket alone.
    """

    name: str
    about: str
    options: tuple[str, ...]
    check: Callable[[Target], None]
    render: Callable[[Jobs, Target, Study], list[Step]]
    after: Callable[[Jobs, Target, Study], list[str]]
    needs: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[Target], None] | None = None
    offered: Callable[[Slice], list[Slice]] = sizes_up_to
    sends_code: bool = False
    tpus: bool = True
    gpus: bool = True
    shares_files: bool = False
    submit_by: Callable[[Jobs, Target, Study], None] | None = None

    def has(self, place: Slice) -> bool:
        """Whether it has such accelerators at all."""
        return self.tpus if place.is_tpu else self.gpus

    def require_fields(self, target: Target) -> None:
        """Raise UserError for the first field of the target that is empty or cannot be."""
        for name, remedy in self.needs.items():
            require(bool(getattr(target, name)), f"{self.name} needs --{name}: {remedy}")
        if self.refuse is not None:
            self.refuse(target)

    def submit(self, jobs: Jobs, target: Target, study: Study) -> None:
        """Hand the jobs over. Raises UserError where a command fails, saying how far it got."""
        if self.submit_by is not None:
            self.submit_by(jobs, target, study)
        else:
            run(self.render(jobs, target, study))
