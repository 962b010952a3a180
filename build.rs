//! Checks the committed C header against the sources and tells the linker what a C library needs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// In the order in which they stand in the header.
const HEADER_SOURCES: [&str; 8] =
    ["types", "context", "codec", "tokens", "attend", "dequantize", "sets", "misc"];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    check_header(&root);
    let abi = abi_number(&root);
    println!("cargo::rustc-env=DECOQUANT_ABI={abi}");
    link_arguments(abi);
    check_cuda_wish();
}

/// Whoever insists on CUDA is not given a library without.
fn check_cuda_wish() {
    println!("cargo::rerun-if-env-changed=DECOQUANT_REQUIRE_CUDA");
    if env::var_os("DECOQUANT_REQUIRE_CUDA").is_some_and(|v| v == "1") {
        println!("cargo::error=DECOQUANT_REQUIRE_CUDA is 1, and this version has no CUDA backend");
    }
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
