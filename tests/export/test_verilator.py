"""Streams of words through small modules of our own, whose answer is known."""

import os
import shutil

import numpy as np
import pytest

from export import verilator
from export.format import ToolMissing
from sdq.errors import RunError

needs_verilator = pytest.mark.skipif(
    any(shutil.which(name) is None for name in verilator.PROGRAMS),
    reason="Verilator is not installed",
)

ADDER = """
module adder #(parameter N = 7, parameter W = 12) (
    input ap_clk, input ap_rst_n,
    input [95:0] in0_V_TDATA, input in0_V_TVALID, output in0_V_TREADY,
    output [95:0] out0_V_TDATA, output out0_V_TVALID, input out0_V_TREADY
);
    reg [W-1:0] offset[1];
    initial $readmemh("./offset.dat", offset);
    reg valid;
    reg [95:0] held;
    assign in0_V_TREADY = !valid || out0_V_TREADY;
    assign out0_V_TVALID = valid;
    assign out0_V_TDATA = held;
    integer i;
    always @(posedge ap_clk) begin
        if (!ap_rst_n) valid <= 0;
        else if (in0_V_TREADY) begin
            valid <= in0_V_TVALID;
            held <= 0;
            for (i = 0; i < N; i = i + 1)
                held[W*i +: W] <= in0_V_TDATA[W*i +: W] + offset[0];
        end
    end
endmodule
"""


def test_words_hold_the_first_value_in_the_lowest_bits():
    words = verilator.pack(np.array([[1, -2], [-8, 7]]), 4, 16)
    assert words.tolist() == [[0xE1, 0], [0x78, 0]]
    assert verilator.unpack(words, 4, 2, signed=True).tolist() == [[1, -2], [-8, 7]]
    assert verilator.unpack(words, 4, 2, signed=False).tolist() == [[1, 14], [8, 7]]


@needs_verilator
def test_a_module_gets_words_and_gives_them_back(tmp_path):
    """84 bits a word, more than a machine word; a register a word, so a cycle a word."""
    source, data = tmp_path / "adder.v", tmp_path / "data"
    source.write_text(ADDER)
    data.mkdir()
    (data / "offset.dat").write_text("005\n")
    bench = verilator.Bench("adder", [source], data, tmp_path / "made")
    values = np.random.default_rng(0).integers(-2000, 2000, (100, 7))
    words = verilator.pack(values, 12, 96)
    for pauses in (0.0, 0.4):
        found = bench(words, out_bytes=12, count=100, pauses=pauses)
        assert np.array_equal(verilator.unpack(found.words, 12, 7, signed=True), values + 5)
        assert found.cycles == 101 if not pauses else found.cycles > 130
    with pytest.raises(RunError, match="adder: 101 words must come out, got 100 after 100 of 100"):
        bench(words, out_bytes=12, count=101)


@needs_verilator
def test_what_does_not_compile_is_said(tmp_path):
    source = tmp_path / "wrong.v"
    source.write_text("module wrong (input ap_clk); assign nothing = ; endmodule\n")
    with pytest.raises(RunError, match="wrong: Verilator cannot compile it: %Error"):
        verilator.Bench("wrong", [source], tmp_path, tmp_path / "made")


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match=r"needs verilator, .*apt-get install verilator g"):
        verilator.check_installed()
