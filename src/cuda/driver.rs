//! The CUDA driver. Nothing else touches cudarc, and of cudarc only `sys`: its safe layer wants to own streams and leaves
//! the context changed.
//!
//! The driver is looked for when a context is opened, never before; the primary context of the device is retained for as
//! long as the [`Device`] lives, and pushed and popped around each call.

use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys;
use sys::CUresult as Code;

use super::no_kernels;
use super::view::{Address, Stream};
use crate::error::{Error, ErrorKind, Result};

include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));

/// Whether the kernels are in this library.
pub const COMPILED_IN: bool = KERNELS.is_some();
/// Most blocks of a grid in its second dimension, and in its third.
pub const MOST_BLOCKS_Y: usize = 65_535;

/// The image must not lie at an odd address.
#[repr(C, align(64))]
#[allow(dead_code)] // a build without kernels has no image
struct Aligned<T: ?Sized>(T);

/// A device whose kernels are loaded.
#[derive(Debug)]
pub struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    /// Multiprocessors.
    pub sms: usize,
    /// Shared memory that one block may have, and that all blocks of a multiprocessor share.
    pub block_shared: usize,
    pub sm_shared: usize,
    /// A kernel may start before the one ahead of it has ended.
    overlaps: bool,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A kernel of the device's module.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: as for Device.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    fn attribute(self, attribute: sys::CUfunction_attribute, what: &str) -> Result<usize> {
        let mut value = 0;
        // SAFETY: only `Device::kernel` makes one, from a module that stays loaded while the device lives.
        check(unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, self.0) }, what)?;
        Ok(value.max(0) as usize)
    }
}

fn check(code: Code, what: &str) -> Result<()> {
    let kind = match code {
        Code::CUDA_SUCCESS => return Ok(()),
        Code::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::OutOfMemory,
        Code::CUDA_ERROR_NO_DEVICE | Code::CUDA_ERROR_INVALID_DEVICE => ErrorKind::NoBackend,
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => ErrorKind::NoBackend,
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU => ErrorKind::Unsupported,
        _ => ErrorKind::Cuda,
    };
    Err(Error::new(kind, format!("{what}: {}", name(code))))
}

fn name(code: Code) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded, since it gave the code; the text is static.
    let known = unsafe { sys::cuGetErrorName(code, &raw mut text) } == Code::CUDA_SUCCESS && !text.is_null();
    if !known {
        return format!("CUDA error {}", code as u32);
    }
    // SAFETY: the driver's own zero-terminated text.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Opens a device: driver, primary context, kernels.
pub fn open(ordinal: u32) -> Result<Arc<Device>> {
    let Some(image) = KERNELS else { return Err(no_kernels(ordinal)) };
    let missing = |message: String| Error::new(ErrorKind::NoBackend, message);
    // SAFETY: looks for the library only.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing(format!("backend is DQ_BACKEND_CUDA (device {ordinal}); there is no CUDA driver (libcuda) here")));
    }
    // SAFETY: the driver is there. Out parameters live on this stack, handles come from the driver itself; here and below.
    unsafe {
        check(sys::cuInit(0), "the CUDA driver does not start").map_err(|e| missing(e.message))?;
        let (mut version, mut count) = (0, 0);
        check(sys::cuDriverGetVersion(&raw mut version), "cuDriverGetVersion")?;
        if version / 1000 < TOOLKIT_VERSION / 1000 {
            let dotted = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            return Err(missing(format!(
                "the CUDA driver is of version {}; the kernels need {} or newer",
                dotted(version),
                dotted(TOOLKIT_VERSION)
            )));
        }
        check(sys::cuDeviceGetCount(&raw mut count), "cuDeviceGetCount")?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(missing(format!("desc->device is {ordinal}; this machine has {count} CUDA devices")));
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        check(sys::cuDeviceGet(&raw mut device, ordinal as i32), "cuDeviceGet")?;
        check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device), "the device's context cannot be made")?;
        // From here on dropping it releases what was taken.
        let mut opened = Device { device, context, module: std::ptr::null_mut(), sms: 0, block_shared: 0, sm_shared: 0, overlaps: false };
        let _current = opened.enter(Stream(std::ptr::null_mut()))?;
        use sys::CUdevice_attribute as A;
        opened.sms = opened.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        opened.block_shared = opened.attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        opened.sm_shared = opened.attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        opened.overlaps = opened.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? >= 9;
        let loaded = sys::cuModuleLoadData(&raw mut opened.module, image.as_ptr().cast());
        if loaded == Code::CUDA_ERROR_NO_BINARY_FOR_GPU {
            let major = opened.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = opened.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            return Err(Error::unsupported(format!(
                "device {ordinal} has compute capability {major}.{minor}; the kernels were built for {ARCHITECTURES}"
            )));
        }
        check(loaded, "the kernels cannot be loaded")?;
        drop(_current);
        Ok(Arc::new(opened))
    }
}

/// The context is current while this lives; what was current before is again afterwards.
pub struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: `enter` pushed.
        unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
    }
}

/// A kernel, its grid, the threads of a block and the bytes of its dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    pub kernel: Kernel,
    pub grid: (usize, usize, usize),
    pub threads: usize,
    pub shared: usize,
}

impl Device {
    /// Makes the device's context current for a call whose work goes to `stream`.
    pub fn enter(&self, stream: Stream) -> Result<Current> {
        // SAFETY: the context is retained while self lives.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.context) }, "cuCtxPushCurrent")?;
        let current = Current;
        if !stream.0.is_null() {
            let mut context = std::ptr::null_mut();
            // SAFETY: the caller says that it is a stream; the driver says whether it lives.
            check(unsafe { sys::cuStreamGetCtx(stream.0.cast(), &raw mut context) }, "stream is no live stream")?;
            if context != self.context {
                return Err(Error::invalid("stream belongs to another context than the device's primary one"));
            }
        }
        Ok(current)
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        let mut value = 0;
        // SAFETY: a device of the driver.
        check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) }, "cuDeviceGetAttribute")?;
        Ok(value.max(0) as usize)
    }

    /// The kernel of this name, ready to be launched with any shared memory that the device has; `None` when the
    /// library does not carry it. The context is current.
    pub fn kernel(&self, name: &str) -> Result<Option<Kernel>> {
        use sys::CUfunction_attribute as A;
        let text = CString::new(name).expect("no zero in a kernel's name");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the text is zero-terminated; here and below.
        unsafe {
            match sys::cuModuleGetFunction(&raw mut function, self.module, text.as_ptr()) {
                Code::CUDA_ERROR_NOT_FOUND => return Ok(None),
                code => check(code, name)?,
            }
            // Asking also loads a function that the driver would load at its first launch, which may be in a capture.
            let dynamic = self.dynamic_shared(Kernel(function))?;
            check(
                sys::cuFuncSetAttribute(function, A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic as i32),
                name,
            )?;
            // All kernels alike: one that wants another division of the L1 could not start on a multiprocessor before the
            // kernels ahead have left it.
            const ALL_SHARED: i32 = 100;
            check(sys::cuFuncSetAttribute(function, A::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, ALL_SHARED), name)?;
        }
        Ok(Some(Kernel(function)))
    }

    /// Bytes of shared memory that a block of a kernel may have beside what the kernel declares.
    pub fn dynamic_shared(&self, kernel: Kernel) -> Result<usize> {
        let fixed = kernel.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, "shared memory of a kernel")?;
        Ok(self.block_shared.saturating_sub(fixed))
    }

    /// Whether the kernels that were loaded multiply matrices in warp groups: a kernel that does nothing tells it by the threads that
    /// its blocks may have. The context is current.
    pub fn group_mma(&self) -> Result<bool> {
        const WARP_GROUP_THREADS: usize = 128;
        let Some(kernel) = self.kernel("dq_group_mma")? else { return Ok(false) };
        let threads = kernel.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, "threads of a kernel")?;
        Ok(threads >= WARP_GROUP_THREADS)
    }

    /// Blocks of a kernel that one multiprocessor runs at once.
    pub fn blocks_per_sm(&self, kernel: Kernel, threads: usize, shared: usize) -> Result<usize> {
        let mut blocks = 0;
        // SAFETY: a kernel of this device.
        let code = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&raw mut blocks, kernel.0, threads as i32, shared)
        };
        check(code, "occupancy")?;
        Ok(blocks.max(1) as usize)
    }

    /// Launches with one struct of parameters.
    ///
    /// # Safety
    /// `params` is what the kernel takes, and its pointers lead to what the kernel touches until the stream has run it.
    pub unsafe fn launch<P>(&self, launch: &Launch, stream: Stream, params: &P) -> Result<()> {
        // SAFETY: the caller's word.
        unsafe { self.launch_with(launch, stream, params, false) }
    }

    /// The same for a kernel that may start before the one ahead of it in the stream has ended, where the device can do
    /// that; it waits by itself for what it reads of that one.
    ///
    /// # Safety
    /// As for `launch`.
    pub unsafe fn launch_early<P>(&self, launch: &Launch, stream: Stream, params: &P) -> Result<()> {
        // SAFETY: the caller's word.
        unsafe { self.launch_with(launch, stream, params, self.overlaps) }
    }

    /// # Safety
    /// As for `launch`.
    unsafe fn launch_with<P>(&self, launch: &Launch, stream: Stream, params: &P, early: bool) -> Result<()> {
        let Launch { kernel, grid, threads, shared } = *launch;
        if grid.1 > MOST_BLOCKS_Y || grid.2 > MOST_BLOCKS_Y || grid.0 > i32::MAX as usize {
            return Err(Error::unsupported(format!(
                "this call would need a grid of {} x {} x {} blocks; CUDA has 2147483647 x {MOST_BLOCKS_Y} x {MOST_BLOCKS_Y}",
                grid.0, grid.1, grid.2
            )));
        }
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: stream.0.cast(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        let mut pointers = [(&raw const *params).cast::<c_void>().cast_mut()];
        // SAFETY: the caller's word; the driver copies the struct before it returns.
        let code =
            unsafe { sys::cuLaunchKernelEx(&raw const config, kernel.0, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        check(code, "kernel launch")
    }

    /// Whether work on the stream is being recorded into a graph.
    pub fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: `enter` found the stream alive.
        check(unsafe { sys::cuStreamIsCapturing(stream.0.cast(), &raw mut status) }, "cuStreamIsCapturing")?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits for the stream.
    pub fn wait(&self, stream: Stream) -> Result<()> {
        // SAFETY: as above.
        check(unsafe { sys::cuStreamSynchronize(stream.0.cast()) }, "work on the stream failed")
    }

    /// Waits for everything in the device's context.
    pub fn wait_all(&self) -> Result<()> {
        // SAFETY: a context is current.
        check(unsafe { sys::cuCtxSynchronize() }, "work on the device failed")
    }

    /// Copies to the device, ordered by the stream. The bytes may change once this has returned and the stream was
    /// waited for.
    ///
    /// # Safety
    /// `to` has room on the device.
    pub unsafe fn upload(&self, to: Address, bytes: &[u8], stream: Stream) -> Result<()> {
        // SAFETY: the caller's word for the target.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), stream.0.cast()) };
        check(code, "copy to the device")
    }

    /// Copies from the device, once the stream has come so far; waits for it.
    ///
    /// # Safety
    /// `from` has as many bytes on the device.
    pub unsafe fn download(&self, from: Address, bytes: &mut [u8], stream: Stream) -> Result<()> {
        // SAFETY: the caller's word for the source.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), stream.0.cast()) };
        check(code, "copy from the device")?;
        self.wait(stream)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: module and context are the device's own; nothing of them is used afterwards.
        unsafe {
            if !self.module.is_null() && sys::cuCtxPushCurrent_v2(self.context) == Code::CUDA_SUCCESS {
                sys::cuModuleUnload(self.module);
                drop(Current);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// Device memory of the library's own.
#[derive(Debug)]
pub struct Memory {
    pub data: Address,
    device: Arc<Device>,
}

impl Memory {
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let mut data = 0;
        // SAFETY: a context is current.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut data, bytes.max(1)) };
        check(code, &format!("{bytes} bytes of device memory for factors and statistics"))?;
        Ok(Self { data, device: device.clone() })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter(Stream(std::ptr::null_mut())) {
            // SAFETY: allocated by `new`, freed once.
            unsafe { sys::cuMemFree_v2(self.data) };
        }
    }
}

/// Host memory that kernels write: words that the host may look at without waiting.
#[derive(Debug)]
pub struct SharedWords {
    host: *mut u32,
    pub data: Address,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: read with atomic loads only.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// `len` zeros.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self> {
        const PORTABLE_AND_MAPPED: u32 = 3;
        let mut host = std::ptr::null_mut();
        // SAFETY: a context is current; here and below.
        unsafe {
            check(sys::cuMemHostAlloc(&raw mut host, 4 * len.max(1), PORTABLE_AND_MAPPED), "pinned host memory")?;
            let mut words = Self { host: host.cast(), data: 0, len, device: device.clone() };
            words.host.write_bytes(0, len);
            check(sys::cuMemHostGetDevicePointer_v2(&raw mut words.data, host, 0), "pinned host memory")?;
            Ok(words)
        }
    }

    /// What a kernel wrote last, or before; `None` beyond the end.
    pub fn try_get(&self, index: usize) -> Option<u32> {
        use std::sync::atomic::{AtomicU32, Ordering};
        // SAFETY: within the allocation; the device writes whole aligned words.
        (index < self.len).then(|| unsafe { AtomicU32::from_ptr(self.host.add(index)) }.load(Ordering::Acquire))
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter(Stream(std::ptr::null_mut())) {
            // SAFETY: allocated by `new`, freed once.
            unsafe { sys::cuMemFreeHost(self.host.cast()) };
        }
    }
}
