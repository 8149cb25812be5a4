"""A stand-in for NVIDIA's module: as much of its interface as a build uses, and the ways in which a build can end.

Found as ``tensorrt_rtx`` by a worker whose PYTHONPATH begins with this folder. The environment variable FAKE_TRT says
what the build does; the graph is not read. `TensorRT` is the same without what only TensorRT for RTX has.
"""

import enum
import os
import signal
import time

__version__ = "9.9.9"
CACHE = (-1, 2, 48, 16)

if os.environ.get("FAKE_TRT") == "broken":
    raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file: No such file or directory")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0


class ComputeCapability(enum.Enum):
    CURRENT = 1
    SM80 = 80
    SM90 = 90


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class IHostMemory(bytes):
    @property
    def nbytes(self):
        return len(self)


class _Input:
    def __init__(self, name):
        self.name = name


class _Network:
    names = ("inputs_embeds", "past")
    num_inputs = len(names)
    num_layers = 7

    def __init__(self, flags):
        self.flags = flags

    def get_input(self, index):
        return _Input(self.names[index])


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, smallest, usual, largest):
        if name == "past" and any(s[1:] != CACHE[1:] for s in (smallest, usual, largest)):
            raise ValueError("shapes")
        self.shapes[name] = (smallest, usual, largest)


class _Config:
    def __init__(self):
        self.profiles = []

    def add_optimization_profile(self, profile):
        if os.environ.get("FAKE_TRT") == "profile":
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _RtxConfig(_Config):
    def __init__(self):
        super().__init__()
        self.targets = {}
        self.num_compute_capabilities = 0

    def set_compute_capability(self, capability, index):
        if capability is ComputeCapability.SM90 or index >= self.num_compute_capabilities:
            return False
        self.targets[index] = capability.name
        return True


class Builder:
    config = _RtxConfig

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return _Network(flags)

    def create_builder_config(self):
        return self.config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        self.logger.log(ILogger.WARNING, "a warning")
        ending = os.environ.get("FAKE_TRT", "")
        if ending == "hang":
            time.sleep(600)
        if ending == "refuse":
            self.logger.log(
                ILogger.ERROR,
                "IBuilder::build: Error Code 9: no kernel\nfor it In compileGraph at /src/optimizer.cpp:12)",
            )
            self.logger.log(ILogger.ERROR, "and so on")
        if ending == "crash":
            said = "Myelin ([graph.h:1: attach] MyelinCheckException: a.cpp:1: CHECK(0) failed.  In g at /_src/b.cpp:2)"
            self.logger.log(ILogger.ERROR, f"IBuilder::build: Error Code 1: {said}")
        if ending in ("refuse", "silent", "crash"):
            return None
        if ending == "abort":
            self.logger.log(ILogger.INTERNAL_ERROR, "bad optional access")
            os.abort()
        if ending == "kill":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "raise":
            raise TypeError("incompatible function arguments")
        targets = " ".join(getattr(config, "targets", {"": "here"}).values())
        profiles = " ".join(str(p.shapes["inputs_embeds"]) for p in config.profiles)
        return IHostMemory(f"{targets} {profiles}".encode())


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        print("the library prints", path)
        return os.environ.get("FAKE_TRT") != "unread"


class TensorRT:
    """TensorRT itself: no compute capabilities to choose."""

    __version__ = "11.4.0.106"
    NetworkDefinitionCreationFlag, ILogger, OnnxParser = NetworkDefinitionCreationFlag, ILogger, OnnxParser

    class Builder(Builder):
        config = _Config
