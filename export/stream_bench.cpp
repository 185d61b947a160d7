// Streams words through the AXI stream ports in0_V and out0_V of a Verilated layer.
//
// usage: stream_bench INPUTS OUTPUTS IN_BYTES OUT_BYTES OUT_WORDS PAUSES PATIENCE
//
// INPUTS and OUTPUTS are files of words, IN_BYTES and OUT_BYTES each, lowest byte first. Source and
// sink pause in PAUSES of 1000 cycles; once a word is offered it stays until it is taken. Ends when
// nothing has moved for PATIENCE cycles. Prints the cycles from the first word taken to the
// OUT_WORDS-th given, and how many words were taken and given; exit code 3 if these are too few.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <type_traits>
#include <vector>

#include "Vlayer.h"
#include "verilated.h"

namespace {

using Bytes = std::vector<uint8_t>;

template <typename Port>
void put(Port& port, const uint8_t* bytes, size_t count) {
    if constexpr (std::is_integral_v<Port>) {
        port = 0;
        for (size_t i = 0; i < count; i++) port |= static_cast<Port>(bytes[i]) << (8 * i);
    } else {  // more than 64 bits: an array of 32-bit words
        for (size_t i = 0; i < count; i++) {
            if (i % 4 == 0) port[i / 4] = 0;
            port[i / 4] |= static_cast<uint32_t>(bytes[i]) << (8 * (i % 4));
        }
    }
}

template <typename Port>
void append(const Port& port, size_t count, Bytes& to) {
    for (size_t i = 0; i < count; i++) {
        if constexpr (std::is_integral_v<Port>) {
            to.push_back(static_cast<uint8_t>(port >> (8 * i)));
        } else {
            to.push_back(static_cast<uint8_t>(port[i / 4] >> (8 * (i % 4))));
        }
    }
}

class Pauses {
public:
    explicit Pauses(uint32_t per_mille) : per_mille_(per_mille) {}
    bool now() {  // xorshift32: the same sequence everywhere
        state_ ^= state_ << 13;
        state_ ^= state_ >> 17;
        state_ ^= state_ << 5;
        return state_ % 1000 < per_mille_;
    }

private:
    uint32_t state_ = 2463534242u;
    uint32_t per_mille_;
};

Bytes read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void tick(Vlayer& layer) {
    layer.ap_clk = 1;
    layer.eval();
    layer.ap_clk = 0;
    layer.eval();
}

void reset(Vlayer& layer) {
    layer.ap_clk = 0;
    layer.ap_rst_n = 0;
    layer.in0_V_TVALID = 0;
    layer.out0_V_TREADY = 0;
    for (int i = 0; i < 16; i++) tick(layer);
    layer.ap_rst_n = 1;
    for (int i = 0; i < 16; i++) tick(layer);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 8) return 2;
    Verilated::randReset(2);  // registers that reset does not set start at random
    const Bytes inputs = read(argv[1]);
    const size_t in_bytes = std::strtoull(argv[3], nullptr, 10);
    const size_t out_bytes = std::strtoull(argv[4], nullptr, 10);
    const uint64_t wanted = std::strtoull(argv[5], nullptr, 10);
    Pauses pauses(static_cast<uint32_t>(std::strtoul(argv[6], nullptr, 10)));
    const uint64_t patience = std::strtoull(argv[7], nullptr, 10);
    const uint64_t offered = inputs.size() / in_bytes;

    Vlayer layer;
    reset(layer);
    Bytes outputs;
    uint64_t taken = 0, given = 0, cycle = 0, first = 0, last = 0, moved = 0;
    bool holding = false;
    for (; cycle - moved < patience; cycle++) {
        if (!holding && taken < offered && !pauses.now()) {
            holding = true;
            put(layer.in0_V_TDATA, &inputs[taken * in_bytes], in_bytes);
        }
        layer.in0_V_TVALID = holding;
        layer.out0_V_TREADY = !pauses.now();
        layer.eval();
        if (holding && layer.in0_V_TREADY) {
            holding = false;
            if (taken++ == 0) first = cycle;
            moved = cycle;
        }
        if (layer.out0_V_TVALID && layer.out0_V_TREADY) {
            append(layer.out0_V_TDATA, out_bytes, outputs);
            moved = cycle;
            if (++given == wanted) last = cycle;
        }
        tick(layer);
    }
    layer.final();
    std::ofstream(argv[2], std::ios::binary)
        .write(reinterpret_cast<const char*>(outputs.data()), outputs.size());
    const uint64_t cycles = given < wanted ? 0 : last - first + 1;
    std::printf("%llu %llu %llu\n", static_cast<unsigned long long>(cycles),
                static_cast<unsigned long long>(taken), static_cast<unsigned long long>(given));
    return given < wanted ? 3 : 0;
}
