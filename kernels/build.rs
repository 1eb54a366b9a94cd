//! Builds what the CUDA backend embeds: kernels as fat binaries, the bindings of `abi.h`, and the
//! way to a driver that is loaded late. All of it lands in `OUT_DIR`.

use std::env;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

/// Machine code for the data-centre generations; `+` adds PTX, which drivers compile for the rest.
/// `CUDA_TARGETS` names others: one alone builds four times as fast.
const TARGETS: &str = "80+,90a,100a";

const NO_NVCC: &str = "the feature `cuda` needs nvcc 13.0: run kernels/get-toolkit, which installs \
    it below target/; or name one with NVCC or CUDA_HOME, or have it on PATH; or build without \
    the feature";

const NO_LIBCLANG: &str = "the feature `cuda` needs libclang to read kernels/abi.h: run \
    kernels/get-toolkit, which installs it below target/; or install your system's (libclang-dev), \
    or name the folder of a libclang.so with LIBCLANG_PATH; or build without the feature";

/// Builds everything, or says what is missing.
pub fn build() -> Result<(), String> {
    let folder = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("kernels");
    let out = PathBuf::from(variable("OUT_DIR"));
    let targets = env::var("CUDA_TARGETS").unwrap_or_else(|_| TARGETS.to_owned());
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_TARGETS", "LIBCLANG_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    bind_abi(&folder, &out)?;
    trampolines(&folder, &out)?;
    let kernels = files(&folder, &["cu"])?;
    // Of their own folder: what was compiled for other targets is not up to date for these.
    let binaries = out.join(&targets);
    fs::create_dir_all(&binaries).map_err(|error| format!("{}: {error}", binaries.display()))?;
    compile_all(&kernels, &newest(&folder)?, &targets, &binaries)?;
    write(&out.join("modules.rs"), &modules(&kernels, &binaries))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}

fn toolkit() -> PathBuf {
    PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("target/cuda-toolkit")
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Files of a folder with one of these extensions, in order of name.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .collect();
    files.sort();
    Ok(files)
}

/// When what every kernel depends on was last changed.
fn newest(folder: &Path) -> Result<SystemTime, String> {
    let headers = files(folder, &["h", "cuh", "rs"])?;
    Ok(headers.iter().filter_map(|path| changed(path)).max().unwrap_or(SystemTime::UNIX_EPOCH))
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("NVCC") {
        return Ok(named.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = home.into_iter().chain(env::split_paths(&path));
    let mut found = folders.chain([toolkit().join("nvidia/cu13/bin")]).map(|f| f.join("nvcc"));
    found.find(|nvcc| nvcc.is_file()).ok_or_else(|| NO_NVCC.to_owned())
}

fn fat_binary(kernel: &Path, out: &Path) -> PathBuf {
    let name = kernel.file_stem().expect("a file with an extension has a stem");
    out.join(name).with_extension("fatbin")
}

/// Compiles the kernels that are older than their sources, as many at once as cargo allows.
fn compile_all(
    kernels: &[PathBuf],
    headers: &SystemTime,
    targets: &str,
    out: &Path,
) -> Result<(), String> {
    let nvcc = find_nvcc()?;
    let is_stale = |kernel: &&PathBuf| {
        let built = changed(&fat_binary(kernel, out));
        built.is_none_or(|built| built < *headers || changed(kernel).is_none_or(|at| built < at))
    };
    let stale = Mutex::new(kernels.iter().filter(is_stale).collect::<Vec<_>>());
    let problems = Mutex::new(Vec::new());
    let jobs = variable("NUM_JOBS").parse().unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(kernel) = stale.lock().expect("no thread panics").pop() else { break };
                    if let Err(problem) = compile(&nvcc, kernel, targets, out) {
                        problems.lock().expect("no thread panics").push(problem);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no thread panics");
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

fn compile(nvcc: &Path, kernel: &Path, targets: &str, out: &Path) -> Result<(), String> {
    let binary = fat_binary(kernel, out);
    // A failed or interrupted run must not leave something that looks built.
    let partial = binary.with_extension("partial");
    let mut command = Command::new(nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3"]);
    command.args(targets.split(',').map(|target| match target.strip_suffix('+') {
        Some(target) => {
            format!("-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]")
        }
        None => format!("-gencode=arch=compute_{target},code=sm_{target}"),
    }));
    command.arg(kernel).arg("-o").arg(&partial);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("nvcc cannot compile {}: {said}", kernel.display()));
    }
    for line in said.lines() {
        println!("cargo::warning={line}");
    }
    fs::rename(&partial, &binary).map_err(|error| format!("{}: {error}", binary.display()))
}

/// Rust source: the name and the bytes of every fat binary, aligned as the driver reads them.
fn modules(kernels: &[PathBuf], out: &Path) -> String {
    let mut text = format!("pub static MODULES: [(&str, &Aligned<[u8]>); {}] = [\n", kernels.len());
    for kernel in kernels {
        let binary = fat_binary(kernel, out);
        let name = binary.file_stem().expect("it has one").to_string_lossy();
        let bytes = binary.display();
        text += &format!(
            "    ({name:?}, &Aligned {{ align: [], bytes: *include_bytes!(\"{bytes}\") }}),\n"
        );
    }
    text + "];\n"
}

/// Bindings of `abi.h`; its inline functions are wrapped into real ones.
fn bind_abi(folder: &Path, out: &Path) -> Result<(), String> {
    if env::var_os("LIBCLANG_PATH").is_none() {
        let installed = toolkit().join("clang/native");
        if installed.is_dir() {
            // SAFETY: the build script has one thread yet. bindgen takes the path from there alone.
            unsafe { env::set_var("LIBCLANG_PATH", installed) };
        }
    }
    let abi = folder.join("bindings.h");
    let wrappers = out.join("abi_inline.c");
    let generate = || {
        bindgen::Builder::default()
            .header(abi.display().to_string())
            .allowlist_item("(fb|FB)_.*")
            .wrap_static_fns(true)
            .wrap_static_fns_path(&wrappers)
            .constified_enum("fb_weight_type")
            .prepend_enum_name(false)
            .derive_default(true)
            .derive_partialeq(true)
            .layout_tests(true)
            .generate()
            .map_err(|error| format!("kernels/abi.h: {error}"))
    };
    // It panics where the library cannot be loaded.
    let bindings = catch_unwind(generate).map_err(|_| NO_LIBCLANG.to_owned())??;
    let path = out.join("abi.rs");
    bindings.write_to_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if wrappers.is_file() {
        cc::Build::new().file(&wrappers).include(folder).try_compile("forebay_abi").map_err(cc)?;
    }
    Ok(())
}

fn cc(error: cc::Error) -> String {
    format!("the C compiler: {error}")
}

/// The driver's functions as jumps through a table; see `driver/load.c`.
fn trampolines(folder: &Path, out: &Path) -> Result<(), String> {
    let list = folder.join("driver/symbols.txt");
    let names =
        fs::read_to_string(&list).map_err(|error| format!("{}: {error}", list.display()))?;
    let names: Vec<&str> = names.split_whitespace().collect();
    let architecture = variable("CARGO_CFG_TARGET_ARCH");
    let mut text = String::from(".text\n");
    for (index, name) in names.iter().enumerate() {
        let at = format!("forebay_driver_table+{}", 8 * index);
        text += &format!(".globl {name}\n.hidden {name}\n.type {name}, %function\n{name}:\n");
        text += &match architecture.as_str() {
            "x86_64" => format!("  jmp *{at}(%rip)\n"),
            "aarch64" => format!("  adrp x16, {at}\n  ldr x16, [x16, :lo12:{at}]\n  br x16\n"),
            other => return Err(format!("the feature `cuda` knows no trampoline for {other}")),
        };
    }
    let words = |symbol: &str, of: &dyn Fn(usize) -> String| {
        let words = (0..names.len()).map(|i| format!("  .quad {}\n", of(i))).collect::<String>();
        format!(".globl {symbol}\n.hidden {symbol}\n.balign 8\n{symbol}:\n{words}")
    };
    text += ".data\n";
    text += &words("forebay_driver_table", &|_| "forebay_driver_absent".into());
    text += ".section .data.rel.ro,\"aw\"\n";
    text += &words("forebay_driver_names", &|index| format!(".Lname{index}"));
    text +=
        ".section .rodata\n.globl forebay_driver_count\n.hidden forebay_driver_count\n.balign 8\n";
    text += &format!("forebay_driver_count:\n  .quad {}\n", names.len());
    for (index, name) in names.iter().enumerate() {
        text += &format!(".Lname{index}: .asciz \"{name}\"\n");
    }
    text += ".section .note.GNU-stack,\"\",%progbits\n";
    let assembly = out.join("trampolines.s");
    write(&assembly, &text)?;
    // Whole: the bindings, which need these names, come later on the linker's command line.
    let mut build = cc::Build::new();
    build.file(&assembly).file(folder.join("driver/load.c")).link_lib_modifier("+whole-archive");
    build.try_compile("forebay_driver").map_err(cc)
}
