//! Tells the program what it was built for (`forebay --version`).
//!
//! The CUDA kernels will be compiled here once there are any; see kernels/README.md.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["TARGET", "PROFILE"] {
        let value = std::env::var(name).expect("cargo sets it for build scripts");
        println!("cargo::rustc-env=FOREBAY_{name}={value}");
    }
}
