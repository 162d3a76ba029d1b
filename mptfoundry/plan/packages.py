"""Optional packages that a configuration needs.

Versions are read from package metadata; nothing is imported. So a folder of the same name in the working
directory, such as the one that wandb writes, is not mistaken for a package.
"""

from __future__ import annotations

from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import EvalConfig
from mptfoundry.errors import ConfigError

# (section, name) -> pip requirement, with a version that works here.
OF_SECTIONS = {
    # Composer calls Run.get_url, which later versions removed.
    ("loggers", "wandb"): "wandb<0.28",
    ("loggers", "tensorboard"): "tensorboard",
    ("loggers", "mlflow"): "mlflow",
    # Its start with a key, online or offline; earlier versions have not been tried.
    ("loggers", "cometml"): "comet_ml>=3.58",
    ("loggers", "slack"): "slack_sdk",
}
ON_A_GPU = {("callbacks", "system_metrics_monitor"): "pynvml"}
OF_THE_MODEL = {
    "peft_config": "peft>=0.15,<0.22",
    "load_in_8bit": "bitsandbytes>=0.48",
    "load_in_4bit": "bitsandbytes>=0.48",
    "float8_recipe": "torchao>=0.18",
}
PUBLIC_TASKS = "lm-eval>=0.4.13,<0.5"


def missing_packages(config: TrainConfig, device_type: str) -> dict[str, str]:
    """What to do about each package that a run of `config` needs and that is missing here or has an
    unsupported version, by key."""
    table = OF_SECTIONS | (ON_A_GPU if device_type == "cuda" else {})
    needed = {
        f"{section}.{name}": each
        for (section, name), each in table.items()
        if name in getattr(config, section)
    }
    needed |= {f"model.{key}": each for key, each in OF_THE_MODEL.items() if getattr(config.model, key)}
    return {key: problem for key, each in needed.items() if (problem := package_problem(each))}


def refuse_missing_packages(options: EvalConfig) -> None:
    """Raise ConfigError if an evaluation needs a package that is missing here."""
    needed = {f"loggers.{name}": OF_SECTIONS.get(("loggers", name)) for name in options.loggers}
    needed["tasks"] = PUBLIC_TASKS if options.tasks else None
    problems = {key: package_problem(each) for key, each in needed.items() if each is not None}
    if missing := [f"{key}: {problem}" for key, problem in problems.items() if problem]:
        raise ConfigError(missing)


def package_problem(requirement: str) -> str | None:
    """Why a requirement such as `wandb<0.28` is not met, and what to do; None if it is."""
    from importlib import metadata

    from packaging.requirements import Requirement

    package = Requirement(requirement)
    command = f"pip install '{requirement}'" if str(package.specifier) else f"pip install {requirement}"
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return f"needs the package {package.name}: {command}"
    if package.specifier.contains(version, prereleases=True):
        return None
    return f"{package.name} {version} does not work here: {command}"
