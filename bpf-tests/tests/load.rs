//! The same bytes load through libbpf and through aya.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use aya::{EbpfLoader, programs::Program};
use bpf_tests::object::Loaded;
use libbpf_rs::{MapCore as _, MapType};
use underpass::capture::object::{ABI_HASH, OBJECT, OBJECT_WITH_LOG};
use underpass_abi::{COUNTERS, POD_ID_GLOBAL, capacity, programs};

const PROGRAMS: [&str; 11] = [
    programs::CONNECT4,
    programs::CONNECT6,
    programs::GETPEERNAME4,
    programs::GETPEERNAME6,
    programs::GETSOCKNAME4,
    programs::GETSOCKNAME6,
    programs::SOCKOPS,
    programs::GUARD,
    programs::GUARD_L3,
    programs::INBOUND,
    programs::INBOUND_L3,
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
    let loaded = Loaded::new()?;
    let expected = [
        ("PODS", MapType::Hash, 8, 40, capacity::PODS, NO_PREALLOC),
        ("PODS_BY_ID", MapType::Hash, 4, 40, capacity::PODS, NO_PREALLOC),
        ("MESH", MapType::LpmTrie, 20, 4, capacity::MESH, NO_PREALLOC),
        ("EXCLUDED_CIDRS", MapType::LpmTrie, 24, 4, capacity::EXCLUDED_CIDRS, NO_PREALLOC),
        ("PORT_RULES", MapType::Hash, 8, 4, capacity::PORT_RULES, NO_PREALLOC),
        ("SOCKETS", MapType::SkStorage, 4, 24, 0, NO_PREALLOC),
        ("FLOWS", MapType::Hash, 48, 32, capacity::FLOWS, NO_PREALLOC),
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
                Program::CgroupSockAddr(program) => program.load(),
                Program::SockOps(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
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
