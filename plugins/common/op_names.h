// Names that an ONNX graph and the plugins share.
//
// Generated from mbq_export/export/ops.py; do not edit. Make it again:
//     python -m mbq_export.export.op_names plugins/common/op_names.h
// What inputs and attributes mean: docs/formats/graphs.md. C++17.
#ifndef MBQ_OP_NAMES_H
#define MBQ_OP_NAMES_H

namespace mbq {

inline constexpr char kPluginNamespace[] = "mbq";
inline constexpr char kPluginVersion[] = "1";

// Version of the fields in a compiled engine, and the field that holds it: required there, unknown to a graph.
inline constexpr int kPluginAbi = 1;
inline constexpr char kAbiField[] = "abi";

inline constexpr char kFieldN[] = "N";
inline constexpr char kFieldK[] = "K";
inline constexpr char kFieldGroupSize[] = "group_size";
inline constexpr char kFieldBits[] = "bits";
inline constexpr char kFieldLayoutVersion[] = "layout_version";
inline constexpr char kFieldHasBias[] = "has_bias";
inline constexpr char kFieldEpilogue[] = "epilogue";
inline constexpr char kFieldActBits[] = "act_bits";

// What a creator declares: 32-bit integers, each of length 1, all required.
inline constexpr const char *kFields[] = {
    kFieldN, kFieldK, kFieldGroupSize, kFieldBits, kFieldLayoutVersion, kFieldHasBias, kFieldEpilogue, kFieldActBits};
inline constexpr int kFieldCount = 8;

struct OpFacts {
    const char *name;    // ONNX op type and plugin name
    int scheme;          // MBQ_W3A16 ... of mbq.h
    int bits;            // of a code
    int act_bits;        // of an activation; 16 leaves it in its type
    int layout_version;  // of the tiles
    int tile_words;      // 32-bit words of a tile of 16 x 128 codes
    int inputs;          // without the bias: x, qweight, scales, and zeros where there are any
    bool has_zeros;
};

inline constexpr OpFacts kW3Linear = {"W3Linear", 1, 3, 16, 1, 192, 4, true};
inline constexpr OpFacts kW4A16Linear = {"W4A16Linear", 2, 4, 16, 1, 256, 4, true};
inline constexpr OpFacts kW4A8Linear = {"W4A8Linear", 3, 4, 8, 1, 256, 3, false};
inline constexpr OpFacts kOps[] = {kW3Linear, kW4A16Linear, kW4A8Linear};

}  // namespace mbq

#endif
