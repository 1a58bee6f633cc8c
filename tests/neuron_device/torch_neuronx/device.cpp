// A device `neuron` whose memory is the host's and whose kernels are the CPU's, for tests without the hardware.
//
// Tensors are real ones of PrivateUse1: they have storage, views and autograd, and may not be mixed with the CPU's.
// Every operator without a kernel here runs as the CPU's on the same memory. float64 is refused, as the hardware has
// none. The process group hands the same memory to gloo.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>

namespace {

constexpr auto NEURON = c10::DeviceType::PrivateUse1;

// What ran, by the operators' names, since the last `clear`.
std::map<std::string, int64_t> executed;
std::mutex executed_mutex;  // the backward runs in a thread of its own

void note(const std::string& name) {
  std::lock_guard<std::mutex> lock(executed_mutex);
  ++executed[name];
}

// Memory

int64_t allocated = 0, most_allocated = 0;

struct Allocation {
  void* memory;
  size_t size;
};

void release(void* context) {
  auto* allocation = static_cast<Allocation*>(context);
  allocated -= static_cast<int64_t>(allocation->size);
  std::free(allocation->memory);
  delete allocation;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = std::aligned_alloc(64, (size / 64 + 1) * 64);
    std::memset(memory, 0xff, size);  // NaN: nothing may read what it has not written
    allocated += static_cast<int64_t>(size);
    most_allocated = std::max(most_allocated, allocated);
    return {memory, new Allocation{memory, size}, &release, c10::Device(NEURON, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // memory is told apart from its context
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(NEURON, &allocator)

c10::Stream the_stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(NEURON, 0)); }

using NoOpGuard = c10::impl::NoOpDeviceGuardImpl<NEURON>;
struct Guard final : NoOpGuard {
  c10::Device exchangeDevice(c10::Device) const override { return {NEURON, 0}; }
  c10::Device getDevice() const override { return {NEURON, 0}; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override { return the_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return the_stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return the_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return the_stream(); }
  // Work is done when it was asked for: an event has always happened.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::detail::getDefaultCPUGenerator();  // random operators run on the CPU
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = allocator.allocate(size);
    std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

void require_dtype(at::ScalarType dtype) {
  TORCH_CHECK(dtype != at::kDouble, "the device neuron has no float64 (simulated)");
}

// The same memory as a tensor of the CPU. It keeps the storage alive.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != NEURON) return tensor;
  auto storage = tensor.storage();
  c10::DataPtr pointer(
      storage.mutable_data(), new c10::Storage(storage), [](void* held) { delete static_cast<c10::Storage*>(held); },
      c10::Device(c10::kCPU));
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  result.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

// A result of the CPU as a tensor of the device, which keeps its memory alive.
at::Tensor on_device(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu()) return tensor;
  require_dtype(tensor.scalar_type());
  auto storage = tensor.storage();
  auto size = storage.nbytes();
  c10::DataPtr pointer(
      storage.mutable_data(), new c10::Storage(storage), [](void* held) { delete static_cast<c10::Storage*>(held); },
      c10::Device(NEURON, 0));
  c10::Storage same(c10::Storage::use_byte_size_t(), size, std::move(pointer), &allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  result.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  return result;
}

// Operators that make or look at memory

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  require_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  require_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& into, bool) {
  const bool from_device = self.device().type() == NEURON, to_device = into.device().type() == NEURON;
  note(from_device && to_device ? "neuron::copy" : from_device ? "neuron::copy_to_host" : "neuron::copy_to_device");
  on_cpu(into).copy_(on_cpu(self));
  return into;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& into) {
  into.resize_(self.sizes());
  return copy_from(self, into, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto needed = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (needed > impl->storage().nbytes()) Hooks().resizePrivateUse1Bytes(impl->storage(), needed);
  return self;
}

// All other operators

void require_one_device(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  TORCH_CHECK(
      !tensor.defined() || !tensor.is_cpu() || tensor.dim() == 0, "Expected all tensors to be on the same device, but ",
      op.operator_name(), " found a tensor of the CPU beside tensors of neuron:0");
}

c10::IValue argument_on_cpu(const c10::OperatorHandle& op, const c10::IValue& value) {
  if (value.isTensor()) {
    require_one_device(op, value.toTensor());
    return on_cpu(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> moved;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      require_one_device(op, tensor);
      moved.push_back(on_cpu(tensor));
    }
    return moved;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> moved;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      moved.push_back(tensor.has_value() ? std::optional<at::Tensor>(on_cpu(*tensor)) : std::nullopt);
    }
    return moved;
  }
  if (value.isDevice()) return c10::Device(c10::kCPU);
  return value;
}

at::Tensor result_on_device(const at::Tensor& result, const std::vector<c10::IValue>& arguments) {
  if (!result.defined()) return result;
  for (const auto& argument : arguments) {
    if (!argument.isTensor() || !argument.toTensor().defined()) continue;
    const auto& tensor = argument.toTensor();
    const bool is_view = tensor.device().type() == NEURON && tensor.storage().nbytes() > 0 &&
        tensor.storage().data() == result.storage().data();
    if (is_view) {
      return at::native::as_strided_tensorimpl(tensor, result.sizes(), result.strides(), result.storage_offset());
    }
  }
  return on_device(result);
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  note(schema.name());
  const auto num_arguments = schema.arguments().size();
  const std::vector<c10::IValue> arguments(stack->end() - num_arguments, stack->end());
  torch::jit::drop(*stack, num_arguments);
  std::vector<std::pair<at::Tensor, at::Tensor>> made;  // outputs whose size the operator chooses
  for (size_t index = 0; index < num_arguments; ++index) {
    const auto& argument = arguments[index];
    if (schema.arguments()[index].is_out() && argument.isTensor() && argument.toTensor().numel() == 0) {
      made.emplace_back(argument.toTensor(), at::empty({0}, argument.toTensor().options().device(c10::kCPU)));
      stack->push_back(made.back().second);
    } else {
      stack->push_back(argument_on_cpu(op, argument));
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  for (const auto& [output, result] : made) {
    output.resize_(result.sizes());
    on_cpu(output).copy_(result);
  }
  const auto num_results = schema.returns().size();
  std::vector<c10::IValue> results(stack->end() - num_results, stack->end());
  torch::jit::drop(*stack, num_results);
  for (size_t number = 0; number < num_results; ++number) {
    const auto* alias = schema.returns()[number].alias_info();
    auto& result = results[number];
    if (alias != nullptr && alias->isWrite()) {  // in place: the argument itself
      for (size_t index = 0; index < num_arguments; ++index) {
        const auto* of_argument = schema.arguments()[index].alias_info();
        if (of_argument != nullptr && of_argument->isWrite() && of_argument->beforeSets() == alias->beforeSets()) {
          result = arguments[index];
          break;
        }
      }
    } else if (result.isTensor()) {
      result = result_on_device(result.toTensor(), arguments);
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> moved;
      for (const at::Tensor& tensor : result.toTensorVector()) moved.push_back(result_on_device(tensor, arguments));
      result = moved;
    }
    stack->push_back(result);
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_IF_NOT_SAID(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_IF_NOT_SAID)
  AT_FORALL_PROMOTE(WIDEST)
}

// Process group

class Group final : public c10d::Backend {
 public:
  explicit Group(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "neuron"; }

  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }

  c10::intrusive_ptr<c10d::Work> broadcast(
      std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    auto same = shared(tensors);
    return gloo_->broadcast(same, options);
  }

  c10::intrusive_ptr<c10d::Work> allreduce(
      std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    auto same = shared(tensors);
    return gloo_->allreduce(same, options);
  }

  c10::intrusive_ptr<c10d::Work> allgather(
      std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override {
    std::vector<std::vector<at::Tensor>> same_outputs;
    for (auto& group : outputs) same_outputs.push_back(shared(group));
    auto same_inputs = shared(inputs);
    return gloo_->allgather(same_outputs, same_inputs, options);
  }

  c10::intrusive_ptr<c10d::Work> _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto same_output = shared(output), same_input = shared(input);
    return gloo_->_allgather_base(same_output, same_input, options);
  }

  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto same_output = shared(output), same_input = shared(input);
    return gloo_->_reduce_scatter_base(same_output, same_input, options);
  }

  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    return gloo_->barrier(options);
  }

 private:
  static at::Tensor shared(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == NEURON, "the process group of neuron was given a tensor of ", tensor.device());
    note("neuron::collective");
    return on_cpu(tensor);
  }

  static std::vector<at::Tensor> shared(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> same;
    for (const auto& tensor : tensors) same.push_back(shared(tensor));
    return same;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

PYBIND11_MODULE(simulated_neuron, m) {
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("group", [](const c10::intrusive_ptr<c10d::Backend>& gloo) {
    return c10::static_intrusive_pointer_cast<c10d::Backend>(c10::make_intrusive<Group>(gloo));
  });
  m.def("executed", [] {
    std::lock_guard<std::mutex> lock(executed_mutex);
    return executed;
  });
  m.def("clear_executed", [] {
    std::lock_guard<std::mutex> lock(executed_mutex);
    executed.clear();
  });
  m.def("allocated", [] { return std::make_pair(allocated, most_allocated); });
}
