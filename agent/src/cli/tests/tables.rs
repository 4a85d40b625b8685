//! Tables as people see them. `UPDATE_EXPECT=1 cargo test tables_for_people` writes them anew.

use expect_test::expect;

use super::samples::{a_report, a_status, connections, explanations, policies, services, workloads};
use crate::cli::output::{Style, View as _};

#[test]
fn tables_for_people() {
    let name = "shop/other";
    expect![[r"
        version        1.2.3
        node           node-a
        trust domain   cluster.local
        data path      user
        configuration  generation 4, from last good copy (1 accepted, 2 rejected)
        config error   n.yaml:1:1: shop/other
        probe cgroup   /system.slice/kubelet.service (active)
        probe cgroup   /system.slice/kubelet.service (active only where packets carry their sockets: no room)
        probe cgroup   /system.slice/kubelet.service (missing: its probes fail under STRICT)
        probe cgroup   /system.slice/kubelet.service (refused: pods are in it)
        probes         declared ports take plaintext from anybody at 10.0.0.1, fd00::1
        plaintext      shop/web (not ended, forbidden by mode; 3 attempts: no descriptors)

        WORKLOAD    STATE     POD  IDENTITY                               CERTIFICATE UNTIL     REASON
        shop/web    enrolled  3    spiffe://cluster.local/ns/shop/sa/web  2027-01-15T10:00:00Z  -
        shop/other  refused   -    spiffe://cluster.local/ns/shop/sa/web  -                     port 15008 in the pod is already in use by nginx (17)

        WORKLOAD  INTERFACE  KIND     NODE-SIDE GUARD
        shop/web  net1       macvlan  none, only the guard inside the pod
        shop/web  eth9       veth     on veth18; the interface has left the pod's namespace

        COUNTER                     VALUE
        tunnels out                 0
        tunnels in                  0
        resumed                     0
        records in the kernel       0
        passed through              0
        plaintext let in by policy  0
        closed clean                0
        closed by reset             0
        retries                     0
        refused: not-tls            3
        bpf: captured               9
    "]].assert_eq(&a_status(name).table(Style::TABLE));
    expect![[r"
        version        1.2.3
        node           node-a
        trust domain   cluster.local
        data path      user
        configuration  generation 4, from last good copy (1 accepted, 2 rejected)
        config error   n.yaml:1:1: shop/other
        probe cgroup   /system.slice/kubelet.service (active)
        probe cgroup   /system.slice/kubelet.service (active only where packets carry their sockets: no room)
        probe cgroup   /system.slice/kubelet.service (missing: its probes fail under STRICT)
        probe cgroup   /system.slice/kubelet.service (refused: pods are in it)
        probes         declared ports take plaintext from anybody at 10.0.0.1, fd00::1
        plaintext      shop/web (not ended, forbidden by mode; 3 attempts: no descriptors)

        WORKLOAD    STATE     POD  IDENTITY                               CERTIFICATE UNTIL     REASON                                                 SERIAL  NETNS
        shop/web    enrolled  3    spiffe://cluster.local/ns/shop/sa/web  2027-01-15T10:00:00Z  -                                                      4a2f    /run/netns/web
        shop/other  refused   -    spiffe://cluster.local/ns/shop/sa/web  -                     port 15008 in the pod is already in use by nginx (17)  -       /run/netns/web

        WORKLOAD  INTERFACE  KIND     NODE-SIDE GUARD
        shop/web  net1       macvlan  none, only the guard inside the pod
        shop/web  eth9       veth     on veth18; the interface has left the pod's namespace

        COUNTER                     VALUE
        tunnels out                 0
        tunnels in                  0
        resumed                     0
        records in the kernel       0
        passed through              0
        plaintext let in by policy  0
        closed clean                0
        closed by reset             0
        retries                     0
        refused: not-tls            3
        bpf: captured               9
    "]].assert_eq(&a_status(name).table(Style::WIDE));
    expect![[r"
        WORKLOAD     STATE     NODE        ADDRESSES           PROTOCOL   MODE        IDENTITY
        shop/web     enrolled  node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web
        shop/other   refused   node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web
        shop/web     waiting   node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web
        shop/legacy  -         shop/other  10.77.0.2, fd00::2  plain      permissive  spiffe://cluster.local/ns/shop/sa/web
        4 of 9 workloads; use --limit for more
    "]].assert_eq(&workloads(name).table(Style::TABLE));
    expect![[r"
        WORKLOAD     STATE     NODE        ADDRESSES           PROTOCOL   MODE        IDENTITY                               POD  MODE SET BY  PORT MODES        REASON
        shop/web     enrolled  node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web  3    namespace    9090: permissive  -
        shop/other   refused   node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web  -    namespace    9090: permissive  the namespace does not exist
        shop/web     waiting   node-a      10.77.0.2, fd00::2  underpass  strict      spiffe://cluster.local/ns/shop/sa/web  -    namespace    9090: permissive  -
        shop/legacy  -         shop/other  10.77.0.2, fd00::2  plain      permissive  spiffe://cluster.local/ns/shop/sa/web  -    mesh         -                 -
        4 of 9 workloads; use --limit for more
    "]].assert_eq(&workloads(name).table(Style::WIDE));
    expect![[r"
        SERVICE    HOSTNAME    VIPS       PORTS         ENDPOINTS
        shop/web   shop/other  10.96.0.1  80:8080, 443  200 (1 plain)
        shop/gone  shop/other  10.96.0.1  80:8080, 443  0
    "]]
    .assert_eq(&services(name).table(Style::TABLE));
    expect![[r"
        SERVICE    HOSTNAME    VIPS       PORTS         ENDPOINTS      WORKLOADS
        shop/web   shop/other  10.96.0.1  80:8080, 443  200 (1 plain)  shop/other, shop/other, ...
        shop/gone  shop/other  10.96.0.1  80:8080, 443  0              -
    "]]
    .assert_eq(&services(name).table(Style::WIDE));
    expect![[r"
        NAME     SCOPE      ACTION  DRY RUN  RULES  WORKLOADS  STATUS   DETAIL
        a/one    namespace  DENY    yes      2      7 (3)      active   -
        a/two    namespace  DENY    yes      2      7 (3)      partial  not evaluated: hosts, paths
        a/three  namespace  DENY    yes      2      7 (3)      invalid  shop/other
    "]]
    .assert_eq(&policies(name).table(Style::TABLE));
    expect![[r"
        service web.shop.svc.cluster.local: 4 endpoints

        DENIED: plaintext -> shop/other ([fd00::2]:8080)
          because    mode strict (set for the namespace) refuses plaintext
          source     192.0.2.7
          mode       strict (set for the namespace)
          node       node-a
          policies   allowed: nothing denies
          dry run    with the dry-run policies denied: DENY policy a/b, rules[0]

          POLICY        SCOPE  ACTION  DRY RUN  MATCHES  BECAUSE
          shop/clients  -      -       -        no       shop/other

        and 3 more endpoints; give one's own address
    "]]
    .assert_eq(&explanations(name).table(Style::TABLE));
    expect![[r"
        trust domain cluster.local, certificates from local

        IDENTITY                                  STATE    VALID UNTIL           LEFT  ISSUER      SERIAL
        spiffe://cluster.local/ns/shop/sa/web     valid    2027-01-15T10:00:00Z  1h    shop/other  4a2f
        spiffe://cluster.local/ns/shop/sa/client  missing  -                     -     -           -
    "]]
    .assert_eq(&a_report(name).table(Style::TABLE));
    expect![[r"
        trust domain cluster.local, certificates from local

        IDENTITY                                  STATE    VALID UNTIL           LEFT  ISSUER      SERIAL  WORKLOADS             VALID FROM            KEY        CHAIN  ROOTS
        spiffe://cluster.local/ns/shop/sa/web     valid    2027-01-15T10:00:00Z  1h    shop/other  4a2f    shop/web, shop/other  2027-01-15T08:00:00Z  ECDSA 256  1      CN=root
        spiffe://cluster.local/ns/shop/sa/client  missing  -                     -     -           -       shop/client           -                     -          -      -
    "]].assert_eq(&a_report(name).table(Style::WIDE));
    expect![[r"
        ID  AGE    WAY  WORKLOAD    CLIENT          DESTINATION   CLIENT IDENTITY                           SERVER IDENTITY                        PATH                SENT     RECEIVED
        7   1m 1s  in   shop/other  10.0.0.1:40000  10.96.0.1:80  spiffe://cluster.local/ns/shop/sa/client  spiffe://cluster.local/ns/shop/sa/web  ktls                2.0 KiB  0 B
        8   1m 1s  out  shop/other  10.0.0.1:40000  10.96.0.1:80  spiffe://cluster.local/ns/shop/sa/client  spiffe://cluster.local/ns/shop/sa/web  user (unavailable)  2.0 KiB  0 B
        9   1m 1s  in   shop/other  10.0.0.1:40000  10.96.0.1:80  -                                         -                                      plain               2.0 KiB  0 B
        3 of 5 connections; use --limit for more
    "]].assert_eq(&connections(name).table(Style::TABLE));
    expect![[r"
        ID  AGE    WAY  WORKLOAD    CLIENT          DESTINATION   CLIENT IDENTITY                           SERVER IDENTITY                        PATH                SENT     RECEIVED  SERVICE     UPSTREAM        CIPHER                    RESUMED
        7   1m 1s  in   shop/other  10.0.0.1:40000  10.96.0.1:80  spiffe://cluster.local/ns/shop/sa/client  spiffe://cluster.local/ns/shop/sa/web  ktls                2.0 KiB  0 B       shop/other  10.0.0.2:15008  TLS13_AES_256_GCM_SHA384  yes
        8   1m 1s  out  shop/other  10.0.0.1:40000  10.96.0.1:80  spiffe://cluster.local/ns/shop/sa/client  spiffe://cluster.local/ns/shop/sa/web  user (unavailable)  2.0 KiB  0 B       shop/other  10.0.0.2:15008  TLS13_AES_256_GCM_SHA384  -
        9   1m 1s  in   shop/other  10.0.0.1:40000  10.96.0.1:80  -                                         -                                      plain               2.0 KiB  0 B       -           10.0.0.2:15008  -                         -
        3 of 5 connections; use --limit for more
    "]].assert_eq(&connections(name).table(Style::WIDE));
}
