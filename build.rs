//! Tells the program what it was built for (`forebay --version`), and with the feature `cuda`
//! compiles the kernels.

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod kernels;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["TARGET", "PROFILE"] {
        let value = std::env::var(name).expect("cargo sets it for build scripts");
        println!("cargo::rustc-env=FOREBAY_{name}={value}");
    }
    #[cfg(feature = "cuda")]
    if let Err(problem) = kernels::build() {
        println!("cargo::error={}", problem.replace('\n', " "));
        std::process::exit(1);
    }
}
