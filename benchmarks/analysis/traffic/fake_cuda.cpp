// A CUDA device in name only: what PyTorch's CPU build asks for before it traces, differentiates and compiles fake
// CUDA tensors. Loaded before `import torch`, which asks for the hooks once and remembers the answer.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/SDPBackend.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

// The registration macro builds on the class's name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace native {

// Without a choice, scaled_dot_product_attention decomposes into matrix products and a softmax.
int64_t choose_flash_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return static_cast<int64_t>(at::SDPBackend::flash_attention);
}
static RegisterCUDADispatch<struct _fused_sdp_choice_stub_DECLARE_DISPATCH_type> register_choice(
    _fused_sdp_choice_stub, &choose_flash_attention);

}  // namespace native
}  // namespace at

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

// The base class stands on device -1, with which autograd's engine indexes an array.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device only() { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return only(); }
  Device exchangeDevice(Device) const override { return only(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, only()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, only()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

const c10::impl::DeviceGuardImplRegistrar register_guard(DeviceType::CUDA, new Guard);

}  // namespace
