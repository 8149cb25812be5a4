"""Loading and running one engine on stand-ins, and that the stand-ins have the names of NVIDIA's own module."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.runtime.tensorrt import fakes
from tests.runtime.tensorrt.fakes import MODULE, FakeDevice, engine_bytes
from vlmexport.engines import EngineSpec, ShapeProfile
from vlmexport.errors import BadInputError
from vlmexport.runtime.protocol import PartOutputError
from vlmexport.runtime.tensorrt.bindings import Library, installed_flavours, load_library
from vlmexport.runtime.tensorrt.engine import Engine, Resident

RTX = Library("rtx", "1.7.1.116", MODULE)
TRT = Library("trt", "11.4.0.106", MODULE)


def write(folder, nodes, inputs, outputs, profiles, **more):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "g.onnx")
    spec = EngineSpec("sum", "projector", tuple(ShapeProfile(str(i), p) for i, p in enumerate(profiles)))
    path = folder / "sum.engine"
    path.write_bytes(engine_bytes(folder / "g.onnx", spec, **more))
    return path


@pytest.fixture
def summing(tmp_path):
    def build(library=RTX, device=None, kind=TensorProto.FLOAT, **more):
        path = write(
            tmp_path,
            [helper.make_node("Add", ["a", "b"], ["c"])],
            [("a", kind, ["n"]), ("b", kind, ["n"])],
            [("c", kind, ["n"])],
            [{name: ((1,), (4,), (8,)) for name in "ab"}, {name: ((1,), (1,), (1,)) for name in "ab"}],
            **more,
        )
        return Engine("projector", path, library, device or FakeDevice())

    return build


def test_the_stand_in_has_only_names_of_the_real_module():
    real = pytest.importorskip("tensorrt_rtx")
    for name, fake in vars(MODULE).items():
        used = {n for n in (*vars(fake), *getattr(fake, "__annotations__", {})) if not n.startswith("_")}
        assert used - {"cache", "read"} <= set(dir(getattr(real, name))) | {"log"}, name
    kinds = real.DataType.__members__
    assert {"FLOAT", "HALF", "INT64", "INT32", "INT8", "UINT8", "BOOL"} <= kinds.keys()


def test_the_real_module_refuses_a_file_that_is_no_engine(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    library = load_library("rtx")
    assert installed_flavours()["rtx"] == library.version
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"this is no engine" * 40)
    with pytest.raises(PartOutputError, match=r"decoder: decoder\.engine does not load: .*magicTag"):
        Engine("decoder", path, library, FakeDevice())


def test_a_file_that_is_no_engine_is_named_with_the_first_error_line(tmp_path):
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"no")
    with pytest.raises(PartOutputError, match=r"decoder\.engine does not load: Serialization assertion"):
        Engine("decoder", path, RTX, FakeDevice())


@pytest.mark.parametrize("library", [RTX, TRT])
def test_each_profile_has_a_context_of_its_own(summing, library):
    engine = summing(library)
    for profile, size in ((1, 1), (0, 5), (1, 1), (0, 2)):
        a = np.arange(size)
        found = engine.run({"a": a, "b": a, "unknown": a}, profile)
        assert found["c"].dtype == np.float32
        assert found["c"].tolist() == (a + a).tolist()
    made = engine._engine._data["contexts"]
    assert len(made) == 2
    assert all(isinstance(how, fakes.IRuntimeConfig) == (library is RTX) for how in made)
    assert engine._kernels is None if library is TRT else engine._config.cache is engine._kernels


def test_shapes_outside_of_a_profile_are_refused_before_the_library_sees_them(summing):
    engine = summing()
    nine = np.ones(9)
    with pytest.raises(BadInputError, match=r"projector: a has shape \[9\]; the engine was built for \[1\] to \[8\]"):
        engine.run({"a": nine, "b": nine})
    with pytest.raises(BadInputError, match=r"\[1, 1\]"):
        engine.run({"a": nine[None, :1], "b": nine[:1]})
    with pytest.raises(PartOutputError, match="no input 'a' in an optimization profile 2"):
        engine.run({"a": nine, "b": nine}, 2)
    with pytest.raises(PartOutputError, match=r"needs the inputs \['b'\]; given were \['a'\]"):
        engine.run({"a": nine})


def test_what_lies_on_the_device_stays_there(summing):
    from vlmexport.runtime.tensorrt.cuda import DeviceBuffer

    device = FakeDevice()
    engine = summing(device=device)
    total = Resident(DeviceBuffer(device, 12), (3,))
    device.zero(total.buffer.address, 12)
    for _ in range(3):
        assert engine.run({"a": np.ones(3)}, residents={"b": total, "c": total}) == {}
    assert device.at(total.buffer.address, 12).view(np.float32).tolist() == [3.0, 3.0, 3.0]


def test_inputs_that_only_shapes_depend_on_stay_with_the_host(summing):
    device = FakeDevice()
    engine = summing(device=device, host=["b"])
    assert engine.run({"a": np.ones(2), "b": np.arange(2)})["c"].tolist() == [1.0, 2.0]
    assert len(device.memory) == 2


def test_a_type_that_numpy_has_not_is_named(summing):
    with pytest.raises(PartOutputError, match="a has the type FP8, which numpy has not"):
        summing(kind=TensorProto.DOUBLE)


def test_a_size_that_only_the_data_tell_is_refused(tmp_path):
    path = write(
        tmp_path,
        [helper.make_node("NonZero", ["a"], ["c"])],
        [("a", TensorProto.FLOAT, ["n"])],
        [("c", TensorProto.INT64, [1, "found"])],
        [{"a": ((1,), (4,), (8,))}],
    )
    with pytest.raises(PartOutputError, match=r"c has the shape \[1, -1\] before it is computed"):
        Engine("projector", path, RTX, FakeDevice()).run({"a": np.ones(3)})


def test_what_the_library_refuses_has_its_own_words(summing, monkeypatch):
    engine = summing()
    refuse = lambda self, name, shape: self._error("no such shape")  # noqa: E731
    monkeypatch.setattr(fakes.IExecutionContext, "set_input_shape", refuse)
    with pytest.raises(PartOutputError, match=r"projector: the shape \[2\] of a is refused: no such shape"):
        engine.run({"a": np.ones(2), "b": np.ones(2)})

    def broken(self, stream):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.undo()
    monkeypatch.setattr(fakes.IExecutionContext, "execute_async_v3", broken)
    with pytest.raises(PartOutputError, match=r"projector: does not run: CUDA error: an illegal memory access$"):
        engine.run({"a": np.ones(2), "b": np.ones(2)})
