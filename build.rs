//! Checks the committed C header against the sources and tells the linker what a C library needs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In the order in which they stand in the header.
const HEADER_SOURCES: [&str; 8] =
    ["types", "context", "codec", "tokens", "attend", "dequantize", "sets", "misc"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(dq_tsan)");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    check_header(&root);
    let abi = abi_number(&root);
    println!("cargo::rustc-env=DECOQUANT_ABI={abi}");
    link_arguments(abi);
    cuda_kernels(&root);
}

const ARCHITECTURES: &str = "80 86 89 90a 100 120";

/// Compiles the CUDA kernels into one fatbin that `src/cuda/driver.rs` embeds. Without a compiler the library has none and
/// says so when it is asked for the backend.
///
/// | variable | |
/// |---|---|
/// | DECOQUANT_CUDA | `auto` (the default), `on`: no compiler is an error, `off` |
/// | DECOQUANT_CUDA_ARCHS | compute capabilities, by default all of the above |
/// | DECOQUANT_FATBIN | a ready one, of CUDA DECOQUANT_FATBIN_VERSION (as 13.0), for builds elsewhere |
/// | DECOQUANT_NVCC, CUDA_HOME, CUDA_PATH | where nvcc is; then PATH and the usual place |
fn cuda_kernels(root: &Path) {
    for name in ["DECOQUANT_CUDA", "DECOQUANT_CUDA_ARCHS", "DECOQUANT_FATBIN", "DECOQUANT_FATBIN_VERSION", "DECOQUANT_NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let wish = env::var("DECOQUANT_CUDA").unwrap_or_else(|_| "auto".into());
    let architectures = env::var("DECOQUANT_CUDA_ARCHS").unwrap_or_else(|_| ARCHITECTURES.into());
    let fatbin = out.join("kernels.fatbin");
    let made = match wish.as_str() {
        _ if env::var_os("CARGO_FEATURE_CUDA").is_none() => return,
        "off" => None,
        "auto" | "on" => ready_fatbin(&fatbin).or_else(|| compile_kernels(root, &fatbin, &architectures)),
        other => {
            println!("cargo::error=DECOQUANT_CUDA is {other}; it must be auto, on or off");
            return;
        }
    };
    if made.is_none() && wish == "on" {
        println!("cargo::error=DECOQUANT_CUDA is on and there is no nvcc in DECOQUANT_NVCC, CUDA_HOME, CUDA_PATH, PATH or the usual place");
    }
    let image = match made {
        Some(_) => "Some({ static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels.fatbin\"))); &IMAGE.0 })",
        None => "None",
    };
    let text = format!(
        "const KERNELS: Option<&[u8]> = {image};\nconst TOOLKIT_VERSION: i32 = {};\nconst ARCHITECTURES: &str = {architectures:?};\n",
        made.unwrap_or(0)
    );
    fs::write(out.join("cuda_kernels.rs"), text).expect("OUT_DIR can be written");
}

/// "13.0" as the driver counts, 13000.
fn version_number(text: &str) -> Option<i32> {
    let (major, minor) = text.trim().split_once('.')?;
    Some(1000 * major.parse::<i32>().ok()? + 10 * minor.parse::<i32>().ok()?)
}

fn ready_fatbin(to: &Path) -> Option<i32> {
    let from = env::var_os("DECOQUANT_FATBIN")?;
    println!("cargo::rerun-if-changed={}", from.to_string_lossy());
    let version = env::var("DECOQUANT_FATBIN_VERSION").ok().as_deref().and_then(version_number);
    if version.is_none() {
        println!("cargo::error=DECOQUANT_FATBIN needs DECOQUANT_FATBIN_VERSION, the CUDA version that it was built with, as 13.0");
        return None;
    }
    if let Err(e) = fs::copy(&from, to) {
        println!("cargo::error=DECOQUANT_FATBIN cannot be copied: {e}");
        return None;
    }
    version
}

/// The version of CUDA that compiled them; `None` without a compiler.
fn compile_kernels(root: &Path, to: &Path, architectures: &str) -> Option<i32> {
    let nvcc = find_nvcc()?;
    let said = Command::new(&nvcc).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split("release ").nth(1)?.split(',').next().and_then(version_number)?;
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "--threads", "0"]);
    for architecture in architectures.split_whitespace() {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    command.arg("-o").arg(to).arg(root.join("kernels/entry.cu"));
    let done = command.output().expect("nvcc was just run");
    if !done.status.success() {
        let text = String::from_utf8_lossy(&done.stderr);
        for line in text.lines().filter(|l| !l.is_empty()).take(20) {
            println!("cargo::error=nvcc: {line}");
        }
        println!("cargo::error=the CUDA kernels do not compile with {}", nvcc.display());
        return None;
    }
    Some(version)
}

fn find_nvcc() -> Option<PathBuf> {
    let named = env::var_os("DECOQUANT_NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|h| PathBuf::from(h).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<_> = env::split_paths(&path).map(|p| p.join("nvcc")).collect();
    named.into_iter().chain(homes).chain(on_path).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]).find(|p| p.is_file())
}

/// The header is committed so that its users need no Rust; the build fails when it is not the one of these sources.
fn check_header(root: &Path) {
    println!("cargo::rerun-if-env-changed=DECOQUANT_WRITE_HEADER");
    println!("cargo::rerun-if-changed=cbindgen.toml");
    println!("cargo::rerun-if-changed=include/decoquant.h");
    let generated = generate_header(root);
    let path = root.join("include/decoquant.h");
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if committed == generated {
        return;
    }
    if env::var_os("DECOQUANT_WRITE_HEADER").is_some_and(|v| v == "1") {
        fs::write(&path, generated).expect("include/decoquant.h can be written");
        return;
    }
    let line = first_difference(&committed, &generated);
    println!(
        "cargo::error=include/decoquant.h is not what src/capi says (line {line}); run DECOQUANT_WRITE_HEADER=1 cargo build"
    );
}

fn generate_header(root: &Path) -> String {
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is valid");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in HEADER_SOURCES {
        let file = format!("src/capi/{name}.rs");
        println!("cargo::rerun-if-changed={file}");
        builder = builder.with_src(root.join(file));
    }
    let mut text = Vec::new();
    builder.generate().expect("src/capi is valid for cbindgen").write(&mut text);
    String::from_utf8(text).expect("the sources are UTF-8")
}

fn first_difference(a: &str, b: &str) -> usize {
    let same = a.lines().zip(b.lines()).take_while(|(a, b)| a == b).count();
    same + 1
}

/// `abi` under `[package.metadata.decoquant]`.
fn abi_number(root: &Path) -> u32 {
    println!("cargo::rerun-if-changed=Cargo.toml");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("the manifest is there");
    let line = manifest.lines().find_map(|line| line.strip_prefix("abi = ")).expect("the manifest has the ABI number");
    line.trim().parse().expect("the ABI number is a number")
}

/// rustc names no SONAME. Thread-local destructors and callbacks may outlive a dlclose: the library stays mapped.
fn link_arguments(abi: u32) {
    let elf = env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|f| f == "unix")
        && env::var("CARGO_CFG_TARGET_VENDOR").is_ok_and(|v| v != "apple");
    if elf {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libdecoquant.so.{abi}");
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
