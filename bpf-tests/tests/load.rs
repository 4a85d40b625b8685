//! The same bytes load through libbpf and through aya.

use std::{collections::BTreeSet, os::fd::AsFd as _};

use anyhow::{Context as _, Result};
use aya::{EbpfLoader, programs::Program as AyaProgram, util::KernelVersion};
use bpf_tests::object::Loaded;
use libbpf_rs::{MapCore as _, MapType, Program, query::ProgInfoIter};
use underpass::capture::object::{ABI_HASH, OBJECT, OBJECT_WITH_LOG};
use underpass_abi::{COUNTERS, POD_ID_GLOBAL, capacity, programs};

const PROGRAMS: [&str; 13] = [
    programs::CONNECT4,
    programs::CONNECT6,
    programs::GETPEERNAME4,
    programs::GETPEERNAME6,
    programs::GETSOCKNAME4,
    programs::GETSOCKNAME6,
    programs::SOCKOPS,
    programs::PROBE,
    programs::GUARD,
    programs::GUARD_L3,
    programs::INBOUND,
    programs::INBOUND_L3,
    programs::NODE_GUARD,
];

#[test]
fn libbpf_loads_every_program() -> Result<()> {
    let loaded = Loaded::new()?;
    let names: BTreeSet<_> = loaded.program_names().into_iter().collect();
    assert_eq!(names, PROGRAMS.map(str::to_owned).into());
    Ok(())
}

#[test]
fn maps_are_what_the_agent_expects() -> Result<()> {
    const NO_PREALLOC: u32 = 1;
    const MMAPABLE: u32 = 1 << 10;
    let loaded = Loaded::new()?;
    let expected = [
        ("PODS", MapType::Hash, 8, 40, capacity::PODS, NO_PREALLOC),
        ("PODS_BY_ID", MapType::Hash, 4, 40, capacity::PODS, NO_PREALLOC),
        ("NODE_INTERFACES", MapType::Hash, 4, 4, capacity::NODE_INTERFACES, NO_PREALLOC),
        ("MESH", MapType::LpmTrie, 20, 4, capacity::MESH, NO_PREALLOC),
        ("EXCLUDED_CIDRS", MapType::LpmTrie, 24, 4, capacity::EXCLUDED_CIDRS, NO_PREALLOC),
        ("PORT_RULES", MapType::Hash, 8, 4, capacity::PORT_RULES, NO_PREALLOC),
        ("PROBE_CGROUPS", MapType::Hash, 8, 4, capacity::PROBE_CGROUPS, NO_PREALLOC),
        ("PROBES", MapType::LruHash, 36, 16, capacity::PROBES, 0),
        ("NODE_ADDRESSES", MapType::Hash, 16, 4, capacity::NODE_ADDRESSES, NO_PREALLOC),
        ("SOCKETS", MapType::SkStorage, 4, 24, 0, NO_PREALLOC),
        ("FLOWS", MapType::Hash, 48, 32, capacity::FLOWS, NO_PREALLOC),
        ("PENDING_FLOWS", MapType::Array, 4, 16, capacity::PENDING_FLOWS, MMAPABLE),
        ("EVENTS", MapType::RingBuf, 0, 0, capacity::EVENTS_BYTES, 0),
        ("COUNTERS", MapType::PercpuArray, 4, 8, COUNTERS as usize, 0),
    ];
    for (name, kind, key, value, entries, flags) in expected {
        let map = loaded.map(name)?;
        let info = map.info()?.info;
        assert_eq!(map.map_type(), kind, "{name}");
        let sizes = (info.key_size, info.value_size, info.max_entries as usize, info.map_flags);
        assert_eq!(sizes, (key, value, entries, flags), "{name}: key, value, entries, flags");
    }
    let known: BTreeSet<_> = expected.iter().map(|map| map.0.to_owned()).collect();
    let names = loaded.maps().map(|map| map.name().to_string_lossy().into_owned());
    let others: Vec<_> = names.filter(|name| !known.contains(name) && !name.ends_with(".rodata")).collect();
    assert!(others.is_empty(), "unexpected maps: {others:?}");
    Ok(())
}

/// Linux 6.1 is the oldest kernel that the programs are for. Its verifier is not here, but what it lacks can be looked for.
#[test]
fn instructions_and_helpers_are_those_of_linux_6_1() -> Result<()> {
    const LAST_HELPER: i32 = 209; // user_ringbuf_drain
    let loaded = Loaded::new()?;
    for name in PROGRAMS {
        let program = loaded.program(name)?;
        for (at, instruction) in program.insns().iter().enumerate() {
            let (code, offset) = (instruction.code, instruction.off);
            let sign_extending_load = code & 0x07 == 0x01 && code & 0xe0 == 0x80;
            let arithmetic = matches!(code & 0x07, 0x04 | 0x07);
            let swap_or_signed = (code == 0xd7) || (arithmetic && offset != 0);
            let long_jump = code == 0x06;
            assert!(
                !(sign_extending_load || swap_or_signed || long_jump),
                "{name}: instruction {at} (code {code:#x}, offset {offset}) is of the fourth instruction set, Linux 6.6"
            );
            if code == 0x85 && instruction.src_reg() == 0 {
                assert!(instruction.imm <= LAST_HELPER, "{name}: helper {} is newer than 6.1", instruction.imm);
            }
        }
    }
    Ok(())
}

/// Linux 6.1 refuses everyone to read stack that was not written; newer ones refuse it without `CAP_PERFMON`, and stand in for it here.
///
/// Between the two, kernels without that capability also refuse something harmless: to overwrite part of a number that was spilled
/// ("attempt to corrupt spilled pointer", limited to pointers since 6.8). There the capability is kept. The agent always has it:
/// `CAP_SYS_ADMIN`, which entering network namespaces needs, includes it.
#[test]
fn nothing_reads_unwritten_stack() -> Result<()> {
    use caps::{CapSet, Capability};
    // capabilities are a thread's, and other tests may run on this one
    let thread = std::thread::spawn(|| -> Result<()> {
        let stands_in = KernelVersion::current()? >= KernelVersion::new(6, 8, 0);
        let dropped = [Capability::CAP_PERFMON, Capability::CAP_SYS_ADMIN].into_iter().filter(|_| stands_in);
        for capability in dropped {
            caps::drop(None, CapSet::Effective, capability).with_context(|| format!("dropping {capability}"))?;
        }
        Loaded::new()?;
        Ok(())
    });
    thread.join().expect("the thread returns its errors")
}

/// How much work verification is differs between kernels; a tenth of what they allow leaves room for that.
#[test]
fn verification_is_far_from_its_limit() -> Result<()> {
    const LIMIT: u32 = 1_000_000;
    let loaded = Loaded::new()?;
    for name in PROGRAMS {
        let id = Program::id_from_fd(loaded.program(name)?.as_fd())?;
        let info =
            ProgInfoIter::default().find(|info| info.id == id).with_context(|| format!("{name} is not loaded"))?;
        println!("{name}: {} instructions verified, {} loaded", info.verified_insns, loaded.program(name)?.insn_cnt());
        assert!((1..LIMIT / 10).contains(&info.verified_insns), "{name}: {} instructions", info.verified_insns);
    }
    Ok(())
}

#[test]
fn aya_loads_both_variants() -> Result<()> {
    for (variant, bytes) in [("plain", OBJECT), ("with log", OBJECT_WITH_LOG)] {
        let mut ebpf = EbpfLoader::new()
            .override_global(POD_ID_GLOBAL, &3u32, true)
            .load(bytes)
            .with_context(|| format!("loading the object {variant}"))?;
        for name in PROGRAMS {
            let program = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?;
            match program {
                AyaProgram::CgroupSockAddr(program) => program.load(),
                AyaProgram::SockOps(program) => program.load(),
                AyaProgram::CgroupSkb(program) => program.load(),
                AyaProgram::SchedClassifier(program) => program.load(),
                other => anyhow::bail!("{name} is a {:?}", other.prog_type()),
            }
            .with_context(|| format!("loading {name} {variant}"))?;
        }
    }
    Ok(())
}

#[test]
fn abi_hash_is_a_directory_name() {
    assert_eq!(ABI_HASH.len(), 16);
    assert!(ABI_HASH.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()), "{ABI_HASH}");
}
