//! The reader against the default model's file.

#[path = "common/mod.rs"]
mod model;

use forebay::model::{DType, Gguf, RopeScaling, quant};

#[test]
fn the_default_model_has_the_shape_it_is_known_to_have() {
    let gguf = Gguf::open(&model::smollm2()).expect("the default model");
    let config = gguf.config().expect("a supported model");
    assert_eq!((config.layers, config.hidden, config.ffn), (30, 576, 1536));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocab, config.context), (49_152, 8_192));
    assert_eq!((config.rope.theta, config.rope.dims), (100_000.0, 64));
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert_eq!(config.norm_eps, 1e-5);
    assert!(config.tied_output && !config.add_bos);
    assert_eq!((config.bos, config.eos, config.eot), (Some(1), Some(2), None));
}

#[test]
fn its_weights_are_finite_and_of_the_size_of_trained_weights() {
    let gguf = Gguf::open(&model::smollm2()).expect("the default model");
    let config = gguf.config().expect("a supported model");
    for weight in config.weights() {
        let tensor = gguf.tensor(&weight.name).expect("checked");
        assert!(matches!(tensor.dtype, DType::F32 | DType::Q4_1 | DType::Q8_0));
        let mut row = vec![0.0f32; tensor.columns()];
        let mut largest = 0.0f32;
        for at in (0..tensor.rows()).step_by(7) {
            quant::dequantize_row(tensor.dtype, tensor.row(at), &mut row);
            assert!(row.iter().all(|value| value.is_finite()), "{}", weight.name);
            largest = row.iter().fold(largest, |most, value| most.max(value.abs()));
        }
        assert!(largest > 1e-3 && largest < 100.0, "{} reaches {largest}", weight.name);
    }
}
